"""Compares an exported model with the trained one: the greatest difference of their logits on probe prompts.

Small models are loaded whole, by transformers and PEFT; a base in 4 or 8 bits is computed by bitsandbytes itself if it is installed.
Larger models, and those that would fill the free memory, run layer by layer (streaming.py).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llamahome.errors import ConfigError, OutOfMemory, Problem
from llamahome.model.adapter import wrap_plain
from llamahome.model.export.gguffile import GgufWeights, gguf_config
from llamahome.model.export.merge import TrainedWeights
from llamahome.model.export.quantized import open_weights, quantization_of, why_not_run
from llamahome.model.export.streaming import add_lora_hooks, stream
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.unsupported import first_line
from llamahome.units import show_bytes

TOLERANCES = {"f32": 1e-4, "f16": 0.05, "bf16": 0.25, "q8_0": 0.75, "q5_1": 1.5, "q5_0": 1.5, "q4_1": 3.0, "q4_0": 3.0}
"""How far the logits of an export may be off, as a share of the standard deviation of the trained model's logits."""
PROBES = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4, 5,",
    "Q: What is the boiling point of water?\nA:",
)
_INT8_TOLERANCE, _DORA_TOLERANCE = 0.75, 0.05
"""The least tolerance of a quantised base: of int8, because bitsandbytes rounds what goes into each layer to 8 bits as well, and of DoRA
on 4 bits, because it rounds the weights whose length DoRA takes."""
LARGE = 1 << 30
"""Bytes of weights in float32 from which models run layer by layer."""
_LONGEST = 256
"""Tokens of a probe."""


@dataclass(frozen=True)
class Difference:
    """How far an export is from the trained model, in logits."""

    greatest: float
    tolerance: float
    """In logits: the share of TOLERANCES times the standard deviation of the trained model's logits."""
    same_choices: float
    """Share of probe positions at which both models choose the same next token."""
    positions: int
    quant: str = "f32"
    """The type of the export's numbers."""
    least: float = 0.0
    """The smallest tolerance, as a share of the standard deviation."""

    @property
    def holds(self) -> bool:
        """Whether it is within the tolerance."""
        return self.greatest <= self.tolerance  # False for NaN

    def require(self, what: str) -> None:
        """ConfigError export.differs when the difference is above the tolerance."""
        if not self.holds:
            message = f"{what} differs from the trained model by {self.greatest:.4g} in a logit; at most {self.tolerance:.4g} is expected"
            hint = None if self.quant == "f32" else f"--quant f32 shows whether rounding to {self.quant} alone makes the difference"
            raise ConfigError(Problem(code="export.differs", message=message, where="--to", hint=hint))


def compare(trained: Sequence[Tensor], exported: Sequence[Tensor], *, quant: str, least: float = 0.0) -> Difference:
    """The difference of logits [tokens, vocabulary] of the same prompts; the shorter vocabulary counts, because exports may pad it.

    `least` is the smallest tolerance, as a share of the standard deviation.
    """
    if not all(logits.isfinite().all() for logits in trained):
        message = "the trained model itself computes NaN or infinity, so nothing can be compared with it"
        raise ConfigError(Problem(code="model.not-finite", message=message, where="MODEL"))
    greatest, equal, positions = 0.0, 0, 0
    for mine, theirs in zip(trained, exported, strict=True):
        width = min(mine.shape[-1], theirs.shape[-1])
        off = (mine[:, :width] - theirs[:, :width]).abs().max().item()
        greatest = off if off != off else max(greatest, off)
        equal += int((mine[:, :width].argmax(-1) == theirs[:, :width].argmax(-1)).sum())
        positions += len(mine)
    spread = torch.cat([logits.flatten() for logits in trained]).std().item()
    return Difference(greatest, max(TOLERANCES[quant], least) * spread, equal / max(1, positions), positions, quant, least)


def least_tolerance(quantization: str | None, weights: TrainedWeights | None) -> float:
    """The least tolerance where the weights of the base are quantised, as a share of the standard deviation; 0 where they are not."""
    if quantization is None:
        return 0.0
    return _INT8_TOLERANCE if "int8" in quantization else 0.0 if weights is not None and weights.plain else _DORA_TOLERANCE


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [tokens, vocabulary] in float32 of each prompt, computed in one pass.

    Shorter prompts are padded at their ends, which causal attention never sees.
    """
    model.eval()
    cut = [list(ids)[:_LONGEST] for ids in prompts]
    longest = max(map(len, cut))
    batch = torch.tensor([ids + [0] * (longest - len(ids)) for ids in cut])
    logits = model(input_ids=batch, use_cache=False).logits
    return [logits[row, : len(ids)].float() for row, ids in enumerate(cut)]


def load_plain(folder: Path) -> PreTrainedModel:
    """The model in `folder` in float32 as transformers alone loads it, with its own attention."""
    settings: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "attn_implementation": "eager"}
    quantized = quantization_of(folder) is not None
    if quantized and why_not_run(folder) is not None:
        return load_dequantized(folder)
    if quantized:
        settings["device_map"] = {"": "cpu"}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ConfigError(Problem(code="model.unreadable", message=f"transformers cannot load it: {first}", where=str(folder))) from error
    if quantized:
        _compute_in_float32(model)
    return model


def _compute_in_float32(model: nn.Module) -> None:
    """Let a model of bitsandbytes compute in float32; on processors it would pack 4-bit weights and compute in bfloat16."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu, module.compute_dtype, module.compute_type_is_set = False, torch.float32, True  # type: ignore[assignment]
        for parameter in module.parameters(recurse=False):
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.data = parameter.data.float()


def load_dequantized(folder: Path) -> PreTrainedModel:
    """A quantised model in float32 with the numbers that its weights stand for, put under the model's own names by transformers."""
    weights, config = open_weights(folder), AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    values = {name: weights.read(name).float() for name in weights.tensors}
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    try:
        model, found = kind.from_pretrained(None, config=config, state_dict=values, output_loading_info=True, **settings)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(Problem(code="model.unreadable", message=first_line(error), where=str(folder))) from error
    if missing := sorted(found["missing_keys"]):
        message = f"its files have no {missing[0]}"
        raise ConfigError(Problem(code="model.unreadable", message=message, where=str(folder)))
    loaded: PreTrainedModel = model
    return loaded


def float32_bytes(folder: Path) -> int:
    """Bytes of the weights in `folder` in float32."""
    return open_weights(folder).nbytes(torch.float32)


def require_room(folder: Path, free: int, *, what: str) -> None:
    """OutOfMemory if the weights in `folder` do not fit in float32 into the `free` bytes of memory."""
    if (needed := float32_bytes(folder)) > free:
        message = f"{what} takes {show_bytes(needed)}, and {show_bytes(free)} are free: this adapter cannot be computed layer by layer"
        hint = f"a machine with {show_bytes(needed)} of free memory"
        raise OutOfMemory(Problem(code="export.larger-than-memory", message=message, where="--to", hint=hint))


def _by_layers(nbytes: int, free: int) -> bool:
    """Whether weights of so many bytes in float32 are computed layer by layer: they are large, or would take a quarter of free memory."""
    return nbytes >= min(LARGE, free // 4)


def trained_logits(
    folder: Path, base: Path, weights: TrainedWeights | None, prompts: Sequence[Sequence[int]], *, free: int = sys.maxsize
) -> list[Tensor]:
    """Logits of the trained model: base and adapter side by side, as PEFT computes them, never merged.

    `weights` is None where the adapter can only be merged in memory, of which `free` bytes are free. Raises OutOfMemory if it does not fit.
    """
    if _by_layers(float32_bytes(base), free) and weights is not None and weights.plain:
        streamed = stream(base, weights.base.read, weights.base)
        modules = {name for name, _ in streamed.named_modules()} if streamed is not None else set()
        if streamed is not None and all(name.removesuffix(".weight") in modules for name in weights.changed):
            add_lora_hooks(streamed, {name.removesuffix(".weight"): weights.lora(name) for name in weights.changed})
            return logits_of(streamed, prompts)
    require_room(base, free, what="comparing it with the trained model")
    return logits_of(wrap_plain(load_plain(base), folder), prompts)


def exported_logits(
    folder: Path, base: Path, weights: TrainedWeights | None, prompts: Sequence[Sequence[int]], *, to: str, free: int = sys.maxsize
) -> list[Tensor]:
    """Logits of the export in `folder`, read from its files. Raises ConfigError when a GGUF file lacks a tensor of the model."""
    if to == "adapter":
        return trained_logits(folder, base, None if weights is None else TrainedWeights(base, folder), prompts, free=free)
    if to == "merged":
        written = WeightStore(folder)
        streamed = stream(folder, written.read, written) if _by_layers(written.nbytes(torch.float32), free) else None
        return logits_of(streamed if streamed is not None else load_plain(folder), prompts)
    path = next(path for path in sorted(folder.glob("*.gguf")) if not path.name.endswith("-adapter.gguf"))
    read = GgufWeights(path, gguf_config(base), weights.shapes if weights is not None else ())
    streamed = stream(base, read.read, read)
    if streamed is None:
        message = "the file does not hold every tensor of the model"
        raise ConfigError(Problem(code="export.differs", message=message, where=str(path)))
    return logits_of(streamed, prompts)
