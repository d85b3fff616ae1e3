"""What a model can take, from its config and the shapes of its tensors: positions, trained length, rows of the vocabulary.

Nothing is loaded: the headers of the weights' files tell every shape. Imports no torch. `data_limits.py` holds the limits against the data.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.errors import ConfigError, Problem

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""What configs call the number of positions."""
_LEARNED = re.compile(r"(^|[._])(wpe|wp|embed_positions|position_embeddings?|positions_embed|pos_emb\w*|positional_embedding\w*)(\.|$)")
"""Names of tables with a row for each position."""
_OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|vit|siglip|clip|image|img|audio|speech|video)")
"""Names of parts that read something else than text: their positions are not those of a row."""
_FIXED_TABLES = ("ctrl", "gptj", "codegen")
"""Architectures that make a table of their positions once; what lies beyond has no row."""
_ALIBI = ("bloom", "mpt", "falcon")
_MOST_OFFSET = 8
"""OPT's table has two rows more than positions."""


@dataclass(frozen=True)
class ModelLimits:
    """Of one model; None where it has no such limit or it is not told."""

    positions: int | None
    """Tokens that a row can have: the model has a table with a row for each position, and no more."""
    trained_length: int | None
    """Tokens up to which rotary positions were trained, scaling counted; longer rows are computed, but were never learned."""
    vocabulary: int | None
    """Token ids that have a row in the embedding: 0 to one less."""


def limits_of(folder: Path) -> ModelLimits:
    """The limits of the model in `folder`. Raises ConfigError when its config cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text: Mapping[str, Any] = {**config, **(config.get("text_config") or {})}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(Problem(code="model.unreadable", message="config.json cannot be read", where=str(folder))) from error
    return limits_from(text, shapes_of(folder))


def limits_from(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> ModelLimits:
    """The limits of a model with this text config and tensors of these shapes, by name."""
    named = next((config[name] for name in _POSITIONS if _is_count(config.get(name))), None)
    of_text = {name: shape for name, shape in shapes.items() if not _OTHER_SENSES.search(name)}
    tables = [shape[0] for name, shape in of_text.items() if len(shape) == 2 and shape[0] > 1 and _LEARNED.search(name)]
    positions = None
    if tables:
        rows = min(tables)
        positions = named if named is not None and 0 <= rows - named <= _MOST_OFFSET else rows
    elif config.get("model_type") in _FIXED_TABLES:
        positions = named
    vocabulary = config.get("vocab_size")
    trained = None if positions is not None or config.get("model_type") in _ALIBI else _trained_length(config, named)
    return ModelLimits(positions, trained, vocabulary if _is_count(vocabulary) else None)


def _trained_length(config: Mapping[str, Any], named: int | None) -> int | None:
    """The length that rotary positions reach. A factor counts from the length before scaling, as configs of yarn and of linear give it."""
    if named is None:
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parts = [part for part in (scaling, *scaling.values()) if isinstance(part, Mapping)] if isinstance(scaling, Mapping) else []
    longest = named
    for part in parts:
        kind, factor = part.get("rope_type") or part.get("type") or "default", part.get("factor")
        before = part.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or 0
        if kind != "default" and isinstance(factor, int | float):
            longest = max(longest, int((before or named) * factor))
    return longest


def without_lost_padding(config: Any) -> bool:
    """Forget a padding id for which the embedding has no row, in place; whether there was one. Rows are never padded with it here."""
    text = config.get_text_config()
    rows, padding = getattr(text, "vocab_size", None), getattr(text, "pad_token_id", None)
    if not (isinstance(rows, int) and isinstance(padding, int)) or -rows <= padding < rows:
        return False
    text.pad_token_id = None
    return True


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the .safetensors files of `folder`, by name; files that cannot be read are left to who loads them."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size < path.stat().st_size else {}
            found |= {name: tuple(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
