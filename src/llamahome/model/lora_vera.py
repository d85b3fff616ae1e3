"""VeRA through PEFT: what it cannot be combined with, the matrices that all its layers share, and what it adds to products and memory.

The shared matrices are drawn from the seed, never change, and are saved with each adapter, so that no other machine must draw them alike.
Source: VeRA, arXiv 2310.11454.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import VeraConfig
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError, Problem
from llamahome.model.lora_choice import in_layers, shares_weight
from llamahome.model.targets import choose


def require_vera(model: PreTrainedModel, parameters: Sequence[str], config: LoraConfig) -> None:
    """Raise ConfigError lora.not-vera if PEFT has VeRA for not all of what `config` selects; `parameters` are adapted without a layer."""
    if parameters:
        names = ", ".join(name.removesuffix(".weight") for name in parameters)
        message = f"in {type(model).__name__} PEFT adapts {names} as parameters, where VeRA does not work"
        raise ConfigError(Problem(code="lora.not-vera", message=message, where="lora.use_vera", hint="--set lora.use_vera=false"))
    if shares_weight(model, config.modules_to_save):
        message = "embedding and output head are one weight in this model, and with VeRA PEFT would train two copies of it"
        hint = "--set lora.modules_to_save=[], or --set lora.use_vera=false"
        raise ConfigError(Problem(code="lora.not-vera", message=message, where="lora.modules_to_save", hint=hint))


def new_vera(model: PreTrainedModel, modules: list[str], config: LoraConfig, *, seed: int) -> VeraConfig:
    """PEFT's settings of a new adapter on `modules`, whose shared matrices depend on `seed` only."""
    return VeraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        target_modules=modules,
        vera_dropout=config.dropout,
        modules_to_save=list(config.modules_to_save) or None,
        projection_prng_key=seed,
        save_projection=True,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's linear layer
    )


def projections_of(adapted: nn.Module) -> dict[str, Tensor]:
    """The two frozen matrices that all layers of a VeRA adapter share, by their names in the state dict; none of another adapter."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, buffer in adapted.named_buffers(remove_duplicate=False):
        side = name.split(".")[-2] if "." in name else ""
        if side in ("vera_A", "vera_B") and (id(buffer) not in found or len(name) < len(found[id(buffer)][0])):
            found[id(buffer)] = name, buffer
    return dict(found.values())


@dataclass(frozen=True)
class FactorBytes:
    """What the factors of VeRA's layers take in a pass, beside what a pass of LoRA of a small rank takes."""

    fixed: int = 0
    """Both factors of every layer."""
    per_token: int = 0
    """The products with the shared A."""
    layers: int = 1
    """Decoder layers, of which one is computed again at a time."""

    def of(self, tokens: int, *, recomputes: bool) -> int:
        """Bytes that a pass of `tokens` keeps, or at most has if layers are computed again."""
        return (self.fixed + tokens * self.per_token) // (self.layers if recomputes else 1)


def factor_bytes(model: PreTrainedModel, config: LoraConfig, dtype: torch.dtype) -> FactorBytes:
    """Of a base without adapters whose products are computed in `dtype`; nothing if `config` is not of VeRA."""
    if not config.use_vera:
        return FactorBytes()
    shapes = _shapes(model, config)
    sides = sum(map(sum, shapes))
    size = config.rank * dtype.itemsize
    return FactorBytes(size * sides, size * len(shapes), model.config.get_text_config().num_hidden_layers)


def projection_numbers(model: PreTrainedModel, config: LoraConfig) -> int:
    """Numbers of the two shared matrices on a base without adapters; 0 if `config` is not of VeRA."""
    if not config.use_vera:
        return 0
    shapes = _shapes(model, config)
    return config.rank * (max(shape[0] for shape in shapes) + max(shape[1] for shape in shapes))


def _shapes(model: PreTrainedModel, config: LoraConfig) -> list[tuple[int, int]]:
    """Of the weights that get adapters."""
    paths = in_layers(model, choose(model, config.target_modules), config.layers).modules
    weights: list[Any] = [model.get_submodule(path).weight for path in paths]
    return [(weight.shape[0], weight.shape[1]) for weight in weights]


def shared_products(model: nn.Module) -> int:
    """Numbers of the shared matrices that a token is multiplied with in all layers together, each counted in every layer that uses it."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, VeraLayer)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers for rank in layer.r.values())
