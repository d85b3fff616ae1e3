"""Write a base in 4 or 8 bits once, tensor by tensor, as bitsandbytes stores it, so that transformers with bitsandbytes loads it too.

Nothing but torch is needed. Every linear layer of the decoder whose rows are whole blocks is quantised; head, embeddings, norms, stacked
experts and other modalities stay as they are. NF4 of bases that are not too large is rounded for the inputs of layers (calibration.py),
all else to the nearest numbers (rounding.py). The folder is whole or not there. Memory: the largest tensor of the base, or what
calibration.py says.
"""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llamahome import durable
from llamahome.errors import ConfigError, MachineError, Problem
from llamahome.model.auxiliary_files import copy_auxiliary_files
from llamahome.model.calibration import CannotCalibrate, FittedLayers
from llamahome.model.export.merged import license_of
from llamahome.model.export.weightstore import WeightStore, write_shards
from llamahome.model.load import load_model, without_weights
from llamahome.model.packed_weight import EightBit, Packed
from llamahome.model.rounding import BLOCK, SCALE_BLOCK, to_int8, to_nf4
from llamahome.model.targets import matrices
from llamahome.rundir import as_typed
from llamahome.units import show_bytes

Kind = Literal["nf4", "int8"]
BYTES: Mapping[Kind, float] = {"nf4": 0.52, "int8": 1.01}
"""About how many bytes a number of usual layers takes."""
_STATE_BYTES = 512
"""Room for the description of a weight, padded with spaces, because its length must be known before the weight is quantised."""
_MOST_FITTED = 500_000_000
"""Numbers that are rounded for the inputs of their layers; larger bases lose less by plain rounding, and the time grows faster."""
_NUMBERS_A_MINUTE = 75_000_000
_TELL_S = 60
Pack = Callable[[str, Tensor], Packed]
"""Packs the weight of the layer with this path."""


@dataclass(frozen=True)
class Sizes:
    """What was quantised, and what was not."""

    layers: int
    numbers: int
    nbytes: int
    all_numbers: int
    all_bytes: int

    def line(self, kind: str) -> str:
        """One line for the user."""
        rest = self.all_numbers - self.numbers
        each, over_all = self.nbytes / max(1, self.numbers), self.all_bytes / max(1, self.all_numbers)
        layers = f"{kind}: {self.layers} linear layers of the decoder, {self.numbers / 1e6:,.1f} M parameters at {each:.3f} bytes each"
        return f"{layers}; head, embedding, norms and the rest, {rest / 1e6:,.1f} M, as they are; {over_all:.2f} bytes over all"


def sizes_of(base: Path, kind: Kind) -> Sizes:
    """What quantising the base in `folder` comes to, from the headers of its files. Raises ConfigError as `write_quantized` does."""
    store = WeightStore(base)
    names = quantized_names(store, base)
    numbers = sum(math.prod(store.tensors[name].shape) for name in names)
    nbytes = sum(_packed_bytes(store.tensors[name].shape, kind) for name in names)
    everything = sum(math.prod(info.shape) for info in store.tensors.values())
    others = sum(info.nbytes for name, info in store.tensors.items() if name not in names)
    return Sizes(len(names), numbers, nbytes, everything, nbytes + others)


def _packed_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of codes, scales and tables of one weight."""
    numbers = math.prod(shape)
    if kind == "int8":
        return numbers + 4 * shape[0]
    blocks = numbers // BLOCK
    return numbers // 2 + blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + 4 * (16 + 256)


@functools.lru_cache(maxsize=4)
def _layers(base: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the linear layers that are quantised, and of those that are not. Makes the model without weights, once for each base."""
    model = without_weights(base)
    plain = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    of_decoder = {each.path for each in matrices(model) if each.form == "linear"}
    chosen = [path for path, layer in plain.items() if path in of_decoder and layer.in_features % BLOCK == 0]
    return tuple(chosen), tuple(path for path in plain if path not in chosen)


def quantized_names(store: WeightStore, base: Path) -> dict[str, str]:
    """The tensors to quantise -> the path of their layer. Raises ConfigError model.nothing-to-quantize if there are none."""
    names: dict[str, str] = {}
    for path in _layers(base)[0]:
        own = f"{path}.weight"
        found = [own] if own in store else [name for name in store.tensors if own.endswith(f".{name}") or name.endswith(f".{own}")]
        if len(found) == 1:
            names[found[0]] = path
    if not names:
        message = "no layer of this model can be quantised: it has no plain linear layer whose width is a multiple of 64"
        hint = "--set model.quantization=null"
        raise ConfigError(Problem(code="model.nothing-to-quantize", message=message, where="model.quantization", hint=hint))
    return names


def write_quantized(base: Path, kind: Kind, folder: Path, *, say: Callable[[str], None]) -> None:
    """Write the base in `base` into `folder`, which must not exist. If another process is faster, its folder stays.

    Raises ConfigError if the base cannot be quantised, and MachineError if the folder cannot be written.
    """
    sizes = sizes_of(base, kind)
    say(f"{as_typed(base)} is quantised once, into {as_typed(folder)} ({show_bytes(sizes.all_bytes)})")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        durable.remove_tree(partial)
        durable.remove_remains(folder.parent, ".*.tmp")
        partial.mkdir(parents=True)
        if kind == "nf4" and _worth_fitting(sizes, say):
            _write_fitted(base, sizes, partial, say=say)
        else:
            _write(base, kind, partial, _nearest(kind))
        durable.flush_tree(partial)
        if not folder.exists():
            durable.rename(partial, folder)
    except OSError as error:
        if (folder / "config.json").is_file():  # another process has written it meanwhile
            return
        message = f"the quantised base cannot be written: {error.strerror or error}"
        hint = f"{show_bytes(sizes.all_bytes)} of free space there, or --set model.quantization=null"
        raise MachineError(Problem(code="model.quantized-not-written", message=message, where=as_typed(folder), hint=hint)) from error
    finally:
        durable.remove_tree(partial)


def _nearest(kind: Kind) -> Pack:
    return lambda path, weight_OI: to_int8(weight_OI) if kind == "int8" else to_nf4(weight_OI)


def _worth_fitting(sizes: Sizes, say: Callable[[str], None]) -> bool:
    minutes = math.ceil(sizes.numbers / _NUMBERS_A_MINUTE)
    if sizes.numbers <= _MOST_FITTED:
        say(f"its numbers are rounded for the inputs that its layers get from a text; on two cores that takes about {minutes} min")
        return True
    say(f"each number is rounded for itself: to round so many for the inputs of their layers would take about {minutes} min on two cores")
    return False


def _write_fitted(base: Path, sizes: Sizes, folder: Path, *, say: Callable[[str], None]) -> None:
    """Write it in NF4, rounded for the inputs of its layers if that can be done."""
    store = WeightStore(base)
    names = quantized_names(store, base)
    model = load_model(base, dtype=store.tensors[next(iter(names))].dtype, device=torch.device("cpu"))
    fitted, began = FittedLayers(base, model, names.values()), time.monotonic()
    done, told = 0, began

    def pack(path: str, weight_OI: Tensor) -> Packed:
        nonlocal done, told
        packed = fitted.take(path)
        done += 1
        if time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            say(f"{done:,} of {sizes.layers:,} linear layers are rounded")
        return packed if packed is not None else to_nf4(weight_OI)

    try:
        _write(base, "nf4", folder, pack)
        say(f"rounded in {time.monotonic() - began:,.0f} s")
    except CannotCalibrate as error:
        say(f"each number is rounded for itself, which is less exact: {error}")
        _write(base, "nf4", folder, _nearest("nf4"))


def _write(base: Path, kind: Kind, folder: Path, pack: Pack) -> None:
    store = WeightStore(base)
    names = quantized_names(store, base)
    plain = [(name, info.dtype, info.shape) for name, info in store.tensors.items() if name not in names]
    entries = sorted(plain, key=lambda entry: -entry[1].itemsize)  # so that each tensor lies at a multiple of its item's size
    weight_of: dict[str, str] = {}
    for name in names:
        own = _entries(name, store.tensors[name].shape, kind)
        weight_of |= dict.fromkeys((entry for entry, _, _ in own), name)
        entries += own
    formats = [(f"{name.removesuffix('.weight')}.weight_format", torch.uint8, ()) for name in names if kind == "int8"]
    current: tuple[str, Mapping[str, Tensor]] = ("", {})

    def make(entry: str) -> Tensor:
        nonlocal current
        if (name := weight_of.get(entry)) is None:
            return store.read(entry) if entry in store else torch.tensor(0, dtype=torch.uint8)  # the format 0: by rows
        if current[0] != name:
            current = ("", {})  # so that only one weight is in memory
            packed = pack(names[name], _finite(store.read(name), name, base))
            current = (name, _parts(name, packed, store.tensors[name].dtype))
        return current[1][entry]

    write_shards(folder, [*entries, *formats], make)
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _settings(kind, base, set(names.values()))
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_auxiliary_files(base, folder)
    licence = f"license: {known}\n" if (known := license_of(base)) else ""
    text = f"---\n{licence}---\n\n{base.resolve().name} with the linear layers of its decoder in {kind}, written by llamahome.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _finite(weight: Tensor, name: str, base: Path) -> Tensor:
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):
        message = f"its weights are not all finite: {name} holds NaN or infinity"
        raise ConfigError(Problem(code="model.not-finite", message=message, where=str(base)))
    return weight


def _entries(name: str, shape: tuple[int, ...], kind: Kind) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """The tensors of a quantised weight in the file."""
    path, numbers = name.removesuffix(".weight"), math.prod(shape)
    if kind == "int8":
        return [(f"{path}.SCB", torch.float32, (shape[0],)), (name, torch.int8, shape)]
    blocks, groups = numbers // BLOCK, math.ceil(numbers // BLOCK / SCALE_BLOCK)
    return [
        (f"{name}.quant_map", torch.float32, (16,)),
        (f"{name}.nested_quant_map", torch.float32, (256,)),
        (f"{name}.nested_absmax", torch.float32, (groups,)),
        (name, torch.uint8, (numbers // 2, 1)),
        (f"{name}.absmax", torch.uint8, (blocks,)),
        (f"{name}.quant_state.bitsandbytes__nf4", torch.uint8, (_state_bytes(blocks, groups),)),
    ]


def _state_bytes(blocks: int, groups: int) -> int:
    """Length of the description, with which all entries of a weight together have a multiple of 8 bytes."""
    return _STATE_BYTES + -(4 * groups + blocks) % 8


def _parts(name: str, packed: Packed, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The tensors of `_entries`."""
    path = name.removesuffix(".weight")
    if isinstance(packed, EightBit):
        return {name: packed.numbers_OI, f"{path}.SCB": packed.scales_O}
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
        "nested_blocksize": SCALE_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": packed.offset,
    }
    assert packed.scale_scales is not None and packed.scale_table is not None
    text = json.dumps(state).ljust(_state_bytes(packed.scales.numel(), packed.scale_scales.numel()))
    return {
        name: packed.codes.view(-1, 1),
        f"{name}.absmax": packed.scales,
        f"{name}.quant_map": packed.table,
        f"{name}.nested_absmax": packed.scale_scales,
        f"{name}.nested_quant_map": packed.scale_table,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode()), dtype=torch.uint8),
    }


def _settings(kind: Kind, base: Path, quantized: set[str]) -> dict[str, Any]:
    """quantization_config of config.json, as transformers reads it."""
    chosen, others = _layers(base)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind == "nf4",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": kind == "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": [*others, *(path for path in chosen if path not in quantized)],
    }
