"""Write a base in 4 or 8 bits once, tensor by tensor, as bitsandbytes stores it, so that transformers with bitsandbytes loads it too.

Nothing but torch is needed. Every linear layer of the decoder whose rows are whole blocks is quantised; head, embeddings, norms, stacked
experts and other modalities stay as they are. NF4 of bases that are not too large is rounded for the inputs of layers, and the layers that
lose most by it get int8 (calibration.py). transformers does not load a mixture of both, so the numbers of these layers are written in the
type of the base, without any loss, and load_packed.py holds them in int8 again. All else is rounded to the nearest numbers (rounding.py).
The folder is whole or not there. Memory: the largest tensor of the base, or what calibration.py says.
"""

import json
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamahome import durable
from llamahome.errors import ConfigError, MachineError, Problem
from llamahome.model.auxiliary_files import copy_auxiliary_files
from llamahome.model.calibration import FittedLayers
from llamahome.model.export.merged import license_of
from llamahome.model.export.weightstore import WeightStore, write_shards
from llamahome.model.layer_chain import CannotCalibrate
from llamahome.model.load import load_model
from llamahome.model.packed_weight import EightBit, Packed
from llamahome.model.quantized_sizes import (
    Kind,
    block_of,
    linear_layers,
    more_bytes,
    numbers_in,
    packed_size,
    quantized_names,
    room_for_8_bits,
    sizes_of,
)
from llamahome.model.rounding import SCALE_BLOCK, SMALL_BLOCK, in_steps, steps_for, to_int8, to_nf4
from llamahome.rundir import as_typed
from llamahome.units import show_bytes

_STATE_BYTES = 512
"""Room for the description of a weight, padded with spaces, because its length must be known before the weight is quantised."""
_MINUTES_A_NUMBER, _MINUTES_OF_TEXT = 1 / 90_000_000, 3
"""On two cores: what rounding takes, and the passes over the text, which is shorter for more than `_LONG_TEXT` numbers."""
_LONG_TEXT = 106_000_000
_TELL_S = 60
Pack = Callable[[str, Tensor], Packed]
"""Packs the weight of the layer with this path."""


def write_quantized(base: Path, kind: Kind, folder: Path, *, say: Callable[[str], None]) -> None:
    """Write the base in `base` into `folder`, which must not exist. If another process is faster, its folder stays.

    Raises ConfigError if the base cannot be quantised, and MachineError if the folder cannot be written.
    """
    sizes = sizes_of(base, kind)
    say(f"{as_typed(base)} is quantised once, into {as_typed(folder)} ({show_bytes(sizes.file_bytes)})")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        durable.remove_tree(partial)
        durable.remove_remains(folder.parent, ".*.tmp")
        partial.mkdir(parents=True)
        names, block = quantized_names(WeightStore(base), base), None if kind == "int8" else block_of(sizes.packed_numbers)
        if kind == "nf4" and _worth_fitting(sizes.packed_numbers, block, say):
            _write_fitted(base, names, partial, say=say)
        else:
            _write(base, partial, names, _nearest(block), block)
        durable.flush_tree(partial)
        if not folder.exists():
            durable.rename(partial, folder)
    except OSError as error:
        if (folder / "config.json").is_file():  # another process has written it meanwhile
            return
        message = f"the quantised base cannot be written: {error.strerror or error}"
        hint = f"{show_bytes(sizes.file_bytes)} of free space there, or --set model.quantization=null"
        raise MachineError(Problem(code="model.quantized-not-written", message=message, where=as_typed(folder), hint=hint)) from error
    finally:
        durable.remove_tree(partial)


def _nearest(block: int | None) -> Pack:
    return lambda path, weight_OI: to_int8(weight_OI) if block is None else to_nf4(weight_OI, block)


def minutes_to_fit(numbers: int) -> int:
    """About how long two cores take to round so many numbers for the inputs of their layers."""
    return math.ceil(numbers * _MINUTES_A_NUMBER + _MINUTES_OF_TEXT * min(1, numbers / _LONG_TEXT))


def _worth_fitting(numbers: int, block: int | None, say: Callable[[str], None]) -> bool:
    minutes = minutes_to_fit(numbers)
    if block == SMALL_BLOCK:
        say(f"its numbers are rounded for the inputs that its layers get from a text; on two cores that takes about {minutes} min")
        return True
    say(f"each number is rounded for itself: to round so many for the inputs of their layers would take about {minutes} min on two cores")
    return False


def _write_fitted(base: Path, names: Mapping[str, str], folder: Path, *, say: Callable[[str], None]) -> None:
    """Write it in NF4, rounded for the inputs of its layers if that can be done, with some layers in int8."""
    store, began = WeightStore(base), time.monotonic()
    model = load_model(base, dtype=store.tensors[next(iter(names))].dtype, device=torch.device("cpu"))
    packed_bytes = sum(packed_size(store.tensors[name].shape, SMALL_BLOCK) for name in names)
    room = room_for_8_bits(numbers_in(store, names), packed_bytes)
    done, told = 0, began

    def pack(path: str, weight_OI: Tensor) -> Packed:
        nonlocal done, told
        packed = fitted.take(path)
        done += 1
        if time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            say(f"{done:,} of {len(names):,} linear layers are rounded")
        if packed is not None:
            return packed
        return in_steps(weight_OI, steps_for(weight_OI)) if path in fitted.in_8_bits else to_nf4(weight_OI, SMALL_BLOCK)

    try:
        say("the layers that lose most in 4 bits are looked for, to get 8")
        fitted = FittedLayers(base, model, {path: more_bytes(store, name) for name, path in names.items()}, room)
        _write(base, folder, names, pack, SMALL_BLOCK, in_8_bits=fitted.in_8_bits)
        say(f"rounded in {time.monotonic() - began:,.0f} s")
    except CannotCalibrate as error:
        say(f"each number is rounded for itself, which is less exact: {error}")
        _write(base, folder, names, _nearest(SMALL_BLOCK), SMALL_BLOCK)


def _write(
    base: Path, folder: Path, names: Mapping[str, str], pack: Pack, block: int | None, *, in_8_bits: Collection[str] = frozenset()
) -> None:
    """Write the base with the tensors `names` packed, in NF4 with such blocks or else in int8; `names` has the paths of their layers.

    Those of the layers `in_8_bits` are packed in int8.
    """
    store = WeightStore(base)
    plain = [(name, info.dtype, info.shape) for name, info in store.tensors.items() if name not in names]
    entries = sorted(plain, key=lambda entry: -entry[1].itemsize)  # so that each tensor lies at a multiple of its item's size
    weight_of: dict[str, str] = {}
    for name in names:
        info = store.tensors[name]
        own = [(name, info.dtype, info.shape)] if names[name] in in_8_bits else _entries(name, info.shape, block)
        weight_of |= dict.fromkeys((entry for entry, _, _ in own), name)
        entries += own
    formats = [(f"{name.removesuffix('.weight')}.weight_format", torch.uint8, ()) for name in names if block is None]
    current: tuple[str, Mapping[str, Tensor]] = ("", {})

    def make(entry: str) -> Tensor:
        nonlocal current
        if (name := weight_of.get(entry)) is None:
            return store.read(entry) if entry in store else torch.tensor(0, dtype=torch.uint8)  # the format 0: by rows
        if current[0] != name:
            current = ("", {})  # so that only one weight is in memory
            packed = pack(names[name], _finite(store.read(name), name, base))
            dtype = store.tensors[name].dtype
            current = (name, {name: _values(packed, dtype)} if names[name] in in_8_bits else _parts(name, packed, dtype))
        return current[1][entry]

    write_shards(folder, [*entries, *formats], make)
    kind: Kind = "int8" if block is None else "nf4"
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _settings(kind, base, set(names.values()) - set(in_8_bits))
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


def _entries(name: str, shape: tuple[int, ...], block: int | None) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """The tensors of a quantised weight in the file."""
    path, numbers = name.removesuffix(".weight"), math.prod(shape)
    if block is None:
        return [(f"{path}.SCB", torch.float32, (shape[0],)), (name, torch.int8, shape)]
    blocks, groups = numbers // block, math.ceil(numbers // block / SCALE_BLOCK)
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


def _values(packed: Packed, dtype: torch.dtype) -> Tensor:
    values_OI = torch.empty(packed.shape, dtype=dtype)
    packed.fill(values_OI)
    return values_OI


def _parts(name: str, packed: Packed, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The tensors of `_entries`."""
    path = name.removesuffix(".weight")
    if isinstance(packed, EightBit):
        return {name: packed.numbers_OI, f"{path}.SCB": packed.scales_O}
    state = {
        "quant_type": "nf4",
        "blocksize": packed.block,
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
    chosen, others = linear_layers(base)
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
