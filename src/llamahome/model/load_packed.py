"""Load the layers of a model whose weights bitsandbytes has quantised without ever holding them in 16 bits.

The model is made with gaps where these layers belong, transformers loads everything else, and then the gaps are filled: codes stay
memory-mapped on a processor, scales are copied. The layers beside them that quantize.py has rounded to int8 are in the file in the type of
the base, and held in int8.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llamahome.errors import ConfigError, Problem
from llamahome.model.export.quantized import DequantizedStore, method_of, quantization_of
from llamahome.model.packed_weight import EightBit, Packed, PackedWeight, packed_to
from llamahome.model.rounding import in_steps, int8_multiples, power_of_two_steps
from llamahome.rundir import as_typed

ReadPacked = Callable[[], Packed]
"""Reads the weight of one layer."""


def packed_layers(folder: Path) -> dict[str, ReadPacked]:
    """The layers in `folder` whose weights are quantised, by path. Raises ConfigError if bitsandbytes did not quantise them."""
    settings = quantization_of(folder) or {}
    if str(settings.get("quant_method") or "bitsandbytes") != "bitsandbytes":
        raise ConfigError(_unsupported(folder, method_of(settings)))
    store = DequantizedStore(folder)
    if not store.quantized:
        raise ConfigError(_unsupported(folder, f"{method_of(settings)}, by its config alone: its files hold none that are"))
    mapped = {name: partial(_mapped, info.path) for name, info in store.tensors.items() if name in store.quantized}
    return {name.removesuffix(".weight"): partial(store.packed, name, mapped[name]) for name in store.quantized}


def _mapped(path: Path, name: str) -> Tensor:
    """A tensor of a file, memory-mapped."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _unsupported(folder: Path, method: str) -> Problem:
    message = f"its weights are quantised ({method}), and only those of bitsandbytes, or in 16 or 32 bits, are computed here"
    return Problem(code="model.unsupported", message=message, where=str(folder))


class _Gap(nn.Module):
    """What takes the place of a linear layer while everything else is loaded: its bias alone."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.name = name
        self.sizes = layer.in_features, layer.out_features
        self.register_parameter("bias", layer.bias)


def make_gaps(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the linear layers `names`, paths in the files, by gaps. Raises ConfigError if one of them is no linear layer here."""
    modules = dict(model.named_modules())
    for name in names:
        path = name if name in modules else next((each for each in modules if each.endswith(f".{name}") or name.endswith(f".{each}")), "")
        layer = modules.get(path)
        if type(layer) is not nn.Linear:
            message = f"{name} is quantised, and it is no linear layer of {type(model).__name__}"
            raise ConfigError(Problem(code="model.unsupported", message=message))
        model.set_submodule(path, _Gap(layer, name))


def fill_gaps(model: nn.Module, packed: Mapping[str, ReadPacked], *, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the gaps by linear layers whose weights stay packed and act as matrices in `dtype`."""
    for path, gap in [(path, module) for path, module in model.named_modules() if isinstance(module, _Gap)]:
        inputs, outputs = gap.sizes
        layer: Any = nn.Linear(inputs, outputs, bias=False, device="meta")
        weight = packed[gap.name]()
        if tuple(weight.shape) != (outputs, inputs):
            message = f"{path} is {[outputs, inputs]} by the config and {list(weight.shape)} in the files"
            raise ConfigError(Problem(code="model.unreadable", message=message))
        layer.weight = nn.Parameter(PackedWeight(packed_to(weight, device), dtype), requires_grad=False)
        layer.bias = gap.bias
        model.set_submodule(path, layer)


def hold_in_8_bits(layers: Sequence[nn.Module]) -> None:
    """Hold the weights of linear layers in int8 where nothing is lost by it: each number is one of 255 multiples of a power of two."""
    for layer in (module for each in layers for module in each.modules() if type(module) is nn.Linear):
        weight: Tensor = layer.weight
        if not isinstance(weight, PackedWeight) and (packed := _as_int8(weight.detach())) is not None:
            layer.weight = nn.Parameter(PackedWeight(packed, weight.dtype), requires_grad=False)


def _as_int8(weight_OI: Tensor) -> EightBit | None:
    """The same numbers in int8, if there are any: few are looked at before all."""
    for part_OI in (weight_OI[:1], weight_OI):
        steps_O = power_of_two_steps(part_OI.abs().amax(1).float())
        if not torch.equal(int8_multiples(part_OI.float(), steps_O.unsqueeze(1)), part_OI.float()):
            return None
    return in_steps(weight_OI, steps_O)


def quantized_twice(folder: Path) -> Problem:
    """The problem that model.quantization is set for a base that is quantised already."""
    method = method_of(quantization_of(folder) or {})
    message = f"{as_typed(folder)} is quantised already ({method}), and it is trained as it is"
    return Problem(code="model.quantized-twice", message=message, where="model.quantization", hint="--set model.quantization=null")
