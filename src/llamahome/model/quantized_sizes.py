"""Which linear layers of a base are quantised, and how many bytes that comes to, from the headers of its files.

Where bases that are not too large are in NF4, some layers are in int8 (calibration.py chooses them), as many as MOST_BYTES allow.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from llamahome.errors import ConfigError, Problem
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.load import without_weights
from llamahome.model.rounding import BLOCK, SCALE_BLOCK, SMALL_BLOCK
from llamahome.model.targets import matrices

Kind = Literal["nf4", "int8"]
MOST_BYTES = 0.62
"""Bytes a number of the linear layers that are rounded to NF4 or int8, all together, as they are held in memory."""
MOST_FITTED = 400_000_000
"""Numbers that are rounded for the inputs of their layers; larger bases lose less by plain rounding, and the time grows faster."""
BYTES: Mapping[Kind, float] = {"nf4": 0.52, "int8": 1.01}
"""About how many bytes a number takes in layers of usual sizes that are quantised."""


@dataclass(frozen=True)
class Sizes:
    """What is quantised, and what is not."""

    layers: int
    """In NF4 or int8."""
    numbers: int
    nbytes: int
    all_numbers: int
    all_bytes: int
    """As they are held in memory, the rest in the type of the file."""
    file_bytes: int
    """In the file, where layers in int8 beside others in NF4 have the type of the base."""
    int8_layers: int | None = 0
    """Linear layers in int8 beside others in NF4, so that less is lost; None before they are chosen."""
    int8_numbers: int = 0
    """In these layers; before they are chosen, about as many as will be."""
    int8_bytes: int = 0
    """What they take in memory."""

    @property
    def packed_numbers(self) -> int:
        """In all layers that are held in fewer bits."""
        return self.numbers + self.int8_numbers

    @property
    def packed_bytes(self) -> int:
        """What these layers take in memory."""
        return self.nbytes + self.int8_bytes

    def line(self, kind: str) -> str:
        """One line for the user."""
        rest = self.all_numbers - self.packed_numbers
        layers = f"{kind}: {self.layers} linear layers of the decoder, {self.numbers / 1e6:,.1f} M parameters"
        if self.int8_numbers:
            which = "some" if self.int8_layers is None else f"{self.int8_layers}"
            layers = f"{layers}, and {which} that lose most by it, {self.int8_numbers / 1e6:,.1f} M, in 8 bits,"
        layers = f"{layers} at {self.packed_bytes / max(1, self.packed_numbers):.3f} bytes each"
        over_all = self.all_bytes / max(1, self.all_numbers)
        return f"{layers}; head, embedding, norms and the rest, {rest / 1e6:,.1f} M, as they are; {over_all:.2f} bytes over all"


def sizes_of(base: Path, kind: Kind, copy: WeightStore | None = None) -> Sizes:
    """What quantising the base in `folder` comes to: as in `copy`, or before there is one as it is expected.

    Raises ConfigError as `quantized_names` does.
    """
    store = WeightStore(base)
    names = quantized_names(store, base)
    int8 = [] if copy is None else [name for name in names if copy.tensors[name].dtype.is_floating_point]
    packed = [name for name in names if name not in set(int8)]
    block = None if kind == "int8" else block_of(numbers_in(store, names))
    numbers, nbytes = numbers_in(store, packed), sum(packed_size(store.tensors[name].shape, block) for name in packed)
    int8_numbers, int8_bytes = numbers_in(store, int8), sum(packed_size(store.tensors[name].shape, None) for name in int8)
    if expected := copy is None and block == SMALL_BLOCK:
        int8_numbers, int8_bytes = _expected_in_8_bits(store, names, numbers, nbytes)
        numbers, nbytes = numbers - int8_numbers, round(nbytes * (1 - int8_numbers / numbers))
    layers = None if expected and int8_numbers else len(int8)
    everything = sum(math.prod(info.shape) for info in store.tensors.values())
    others = sum(info.nbytes for name, info in store.tensors.items() if name not in names)
    in_file = nbytes + int8_numbers * store.tensors[next(iter(names))].dtype.itemsize + others
    return Sizes(len(packed), numbers, nbytes, everything, nbytes + int8_bytes + others, in_file, layers, int8_numbers, int8_bytes)


def numbers_in(store: WeightStore, names: Mapping[str, str] | list[str]) -> int:
    """How many numbers these tensors have."""
    return sum(math.prod(store.tensors[name].shape) for name in names)


def block_of(numbers: int) -> int:
    """Numbers that share a scale in NF4 if so many are quantised: small bases lose most by rounding, and large ones need the memory."""
    return SMALL_BLOCK if numbers <= MOST_FITTED else BLOCK


def room_for_8_bits(numbers: int, packed_bytes: int) -> int:
    """Bytes by which `packed_bytes` for so many numbers may grow, so that some layers get int8."""
    return max(0, int(MOST_BYTES * numbers) - packed_bytes)


def more_bytes(store: WeightStore, name: str) -> int:
    """Bytes that a weight takes more in int8 than in NF4 with small blocks."""
    shape = store.tensors[name].shape
    return packed_size(shape, None) - packed_size(shape, SMALL_BLOCK)


def _expected_in_8_bits(store: WeightStore, names: Mapping[str, str], numbers: int, packed_bytes: int) -> tuple[int, int]:
    """Numbers and bytes of layers that will get int8: what is left over is less than the smallest layer needs."""
    room, whole = room_for_8_bits(numbers, packed_bytes), sum(packed_size(store.tensors[name].shape, None) for name in names)
    if room < min(more_bytes(store, name) for name in names):
        return 0, 0
    share = min(1.0, room / max(1, whole - packed_bytes))
    return round(share * numbers), round(share * whole)


def packed_size(shape: tuple[int, ...], block: int | None) -> int:
    """Bytes of codes, scales and tables of one weight in NF4 with blocks of `block` numbers, or in int8 if there are none."""
    numbers = math.prod(shape)
    if block is None:
        return numbers + 4 * shape[0]
    blocks = numbers // block
    return numbers // 2 + blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + 4 * (16 + 256)


@functools.lru_cache(maxsize=4)
def linear_layers(base: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the linear layers that can be quantised, and of the others. Makes the model without weights, once for each base."""
    return quantizable(without_weights(base))


def quantizable(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same of a model that is there."""
    plain = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    of_decoder = {each.path for each in matrices(model) if each.form == "linear"}
    chosen = [path for path, layer in plain.items() if path in of_decoder and layer.in_features % BLOCK == 0]
    return tuple(chosen), tuple(path for path in plain if path not in chosen)


def quantized_names(store: WeightStore, base: Path) -> dict[str, str]:
    """The tensors to quantise -> the path of their layer. Raises ConfigError model.nothing-to-quantize if there are none."""
    names: dict[str, str] = {}
    for path in linear_layers(base)[0]:
        own = f"{path}.weight"
        found = [own] if own in store else [name for name in store.tensors if own.endswith(f".{name}") or name.endswith(f".{own}")]
        if len(found) == 1:
            names[found[0]] = path
    if not names:
        message = f"no layer of this model can be quantised: it has no plain linear layer whose width is a multiple of {BLOCK}"
        hint = "--set model.quantization=null"
        raise ConfigError(Problem(code="model.nothing-to-quantize", message=message, where="model.quantization", hint=hint))
    return names
