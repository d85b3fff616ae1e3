"""What the files of a model hold that its config does not explain: quantised weights, and tensors that no layer takes.

transformers converts whole numbers to weights as they are, without the scales that give them their size, and leaves out tensors that the
model has no place for. The first is refused, the second is told.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from llamahome.errors import ConfigError, Problem
from llamahome.model.limits import read_header
from llamahome.model.weightfiles import weight_files

_ATTRIBUTE = "llamahome_unused"
_CODES = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
"""Types of safetensors that hold codes, where a weight is expected."""
_SCALES = re.compile(r"\.(scales?|weight_scale(_inv)?|weight_scale_2|input_scale|qzeros|biases|SCB|absmax|qweight)$")
"""Matches the names of what quantised weights are computed with."""
_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias|rotary_emb\..*|lm_head\.weight|embed_out\.weight)$"
)
"""Matches the names of what older programs saved and a model computes, and a head that is the embedding."""


def refuse_unexplained(folder: Path) -> None:
    """Raise ConfigError if weights are quantised and config.json has no quantization_config that says how."""
    entries: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            entries |= {name: str(entry["dtype"]) for name, entry in read_header(path).tensors.items()}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # found where files are checked
    scale = next((name for name in entries if _SCALES.search(name)), None)
    code = next((name for name, dtype in entries.items() if name.endswith(".weight") and dtype in _CODES), None)
    if code is None and (scale is None or not any(dtype in _CODES or dtype.startswith("F8") for dtype in entries.values())):
        return
    found = f"{code} has the type {entries[code]}" if code is not None else f"{scale} is a scale"
    message = f"its weights are quantised ({_method(folder)}{found}), and config.json has no quantization_config that says how"
    hint = "take the copy of this model in 16 or 32 bits that the quantised one was made from"
    raise ConfigError(Problem(code="model.unsupported", message=message, where=str(folder), hint=hint))


def _method(folder: Path) -> str:
    """What wrote the weights, if config.json says it in another way: MLX names bits and group size under `quantization`."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    written = config.get("quantization") if isinstance(config, dict) else None
    return f"MLX, {written['bits']} bits: " if isinstance(written, dict) and "bits" in written else ""


def keep_unused(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Remember on the model which tensors of its files no layer takes."""
    setattr(model, _ATTRIBUTE, sorted(name for name in names if not _BUFFERS.search(name)))


def unused_note(model: PreTrainedModel) -> str | None:
    """A line about the tensors in the model's files that no layer takes; None if there are none."""
    names: list[str] = getattr(model, _ATTRIBUTE, [])
    if not names:
        return None
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    what = "1 tensor of this model's files belongs" if len(names) == 1 else f"{len(names):,} tensors of this model's files belong"
    return f"{what} to no layer of it, by its config.json, and {'is' if len(names) == 1 else 'are'} not used: {shown}"
