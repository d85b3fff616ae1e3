"""Which linear layers of a base are quantised, and how many bytes that comes to, from the headers of its files.

In NF4 some layers of bases that are not too large stay in 16 bits (calibration.py chooses them), as many as MOST_BYTES allow.
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
"""Bytes a number of the linear layers that are rounded to NF4 or stay as they are instead, all together."""
MOST_FITTED = 400_000_000
"""Numbers that are rounded for the inputs of their layers; larger bases lose less by plain rounding, and the time grows faster."""
BYTES: Mapping[Kind, float] = {"nf4": 0.52, "int8": 1.01}
"""About how many bytes a number takes in layers of usual sizes that are quantised."""


@dataclass(frozen=True)
class Sizes:
    """What is quantised, and what is not."""

    layers: int
    numbers: int
    nbytes: int
    all_numbers: int
    all_bytes: int
    kept_layers: int | None = 0
    """Linear layers that stay as they are so that less is lost; None before they are chosen."""
    kept_numbers: int = 0
    """In these layers; before they are chosen, about as many as will be."""
    kept_bytes: int = 0

    def line(self, kind: str) -> str:
        """One line for the user."""
        rest, together = self.all_numbers - self.numbers - self.kept_numbers, self.numbers + self.kept_numbers
        layers = f"{kind}: {self.layers} linear layers of the decoder, {self.numbers / 1e6:,.1f} M parameters"
        if self.kept_numbers:
            which = "some" if self.kept_layers is None else f"{self.kept_layers}"
            stays = f" and {which} that lose most by it, {self.kept_numbers / 1e6:,.1f} M, as they are,"
            layers = f"{layers},{stays} at {(self.nbytes + self.kept_bytes) / together:.3f} bytes each"
        else:
            layers = f"{layers} at {self.nbytes / max(1, self.numbers):.3f} bytes each"
        over_all = self.all_bytes / max(1, self.all_numbers)
        return f"{layers}; head, embedding, norms and the rest, {rest / 1e6:,.1f} M, as they are; {over_all:.2f} bytes over all"


def sizes_of(base: Path, kind: Kind, copy: WeightStore | None = None) -> Sizes:
    """What quantising the base in `folder` comes to: as in `copy`, or before there is one as it is expected.

    Raises ConfigError as `quantized_names` does.
    """
    store = WeightStore(base)
    names = quantized_names(store, base)
    kept = [] if copy is None else [name for name in names if copy.tensors[name].dtype.is_floating_point]
    packed = [name for name in names if name not in set(kept)]
    block = None if kind == "int8" else block_of(numbers_in(store, names))
    numbers, nbytes = numbers_in(store, packed), sum(packed_size(store.tensors[name].shape, block) for name in packed)
    kept_numbers, kept_bytes = numbers_in(store, kept), sum(store.tensors[name].nbytes for name in kept)
    if expected := copy is None and block == SMALL_BLOCK:
        kept_numbers, kept_bytes = _expected(store, names, numbers, nbytes)
        numbers, nbytes = numbers - kept_numbers, round(nbytes * (1 - kept_numbers / numbers))
    everything = sum(math.prod(info.shape) for info in store.tensors.values())
    others = sum(info.nbytes for name, info in store.tensors.items() if name not in names)
    layers = None if expected and kept_numbers else len(kept)
    return Sizes(len(packed), numbers, nbytes, everything, nbytes + kept_bytes + others, layers, kept_numbers, kept_bytes)


def numbers_in(store: WeightStore, names: Mapping[str, str] | list[str]) -> int:
    """How many numbers these tensors have."""
    return sum(math.prod(store.tensors[name].shape) for name in names)


def block_of(numbers: int) -> int:
    """Numbers that share a scale in NF4 if so many are quantised: small bases lose most by rounding, and large ones need the memory."""
    return SMALL_BLOCK if numbers <= MOST_FITTED else BLOCK


def room_for_exact(numbers: int, packed_bytes: int) -> int:
    """Bytes by which `packed_bytes` for so many numbers may grow, so that some layers stay as they are."""
    return max(0, int(MOST_BYTES * numbers) - packed_bytes)


def more_bytes(store: WeightStore, name: str) -> int:
    """Bytes that a weight takes more as it is than in NF4 with small blocks."""
    return store.tensors[name].nbytes - packed_size(store.tensors[name].shape, SMALL_BLOCK)


def _expected(store: WeightStore, names: Mapping[str, str], numbers: int, packed_bytes: int) -> tuple[int, int]:
    """Numbers and bytes of layers that will stay as they are: what is left over is less than the smallest layer needs."""
    room, whole = room_for_exact(numbers, packed_bytes), sum(store.tensors[name].nbytes for name in names)
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
