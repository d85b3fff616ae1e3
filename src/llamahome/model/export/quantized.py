"""Reads the weights of a base that bitsandbytes quantised (nf4, fp4, int8), one tensor at a time: packed, or as the numbers they stand for.

`quant_map` holds the value of each 4-bit code and `absmax` the scale of each block, which with double quantisation is a code of
`nested_quant_map`; `SCB` holds the scale of each row of int8. packed_weight.py says what the numbers are. Needs no bitsandbytes.
Source: QLoRA, arXiv 2305.14314; LLM.int8(), arXiv 2208.07339; the names in bitsandbytes' files.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamahome.errors import ConfigError, Problem
from llamahome.model.export.weightstore import TensorInfo, WeightStore
from llamahome.model.packed_weight import EightBit, FourBit, Packed

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def quantization_of(folder: Path) -> Mapping[str, Any] | None:
    """quantization_config in the config.json of `folder`; None if its weights are not quantised or there is no config to read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, Mapping) and found else None


def method_of(settings: Mapping[str, Any]) -> str:
    """How weights are quantised, in words: `bitsandbytes, nf4 with double quantisation`."""
    method = str(settings.get("quant_method") or "bitsandbytes")
    if method != "bitsandbytes":
        bits = settings.get("bits") or settings.get("w_bit")
        return f"{method}, {bits} bits" if bits else method
    if settings.get("load_in_8bit"):
        return "bitsandbytes, int8"
    double = " with double quantisation" if settings.get("bnb_4bit_use_double_quant") else ""
    return f"bitsandbytes, {settings.get('bnb_4bit_quant_type', 'fp4')}{double}"


def open_weights(folder: Path) -> WeightStore:
    """The weights of `folder` as numbers. Raises ConfigError export.quantized where they are quantised in a way that is not read here."""
    settings = quantization_of(folder)
    if settings is None:
        return WeightStore(folder)
    if str(settings.get("quant_method") or "bitsandbytes") != "bitsandbytes":
        message = f"its weights are quantised ({method_of(settings)}), and only those of bitsandbytes (nf4, fp4, int8) can be de-quantised"
        raise ConfigError(Problem(code="export.quantized", message=message, where=str(folder)))
    return DequantizedStore(folder)


def why_not_run(folder: Path) -> str | None:
    """Why bitsandbytes cannot compute the quantised model in `folder` on a processor; None if it can, or if nothing is quantised."""
    if quantization_of(folder) is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    weights = open_weights(folder)
    if isinstance(weights, DequantizedStore) and (name := weights.across_rows) is not None:
        return f"bitsandbytes computes {name} wrongly on processors, where it expects blocks to end with rows"  # seen in 0.50
    return None


@dataclass(frozen=True)
class _FourBit:
    """What the file says of a 4-bit weight."""

    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int = 0
    nested_offset: float = 0.0


class DequantizedStore(WeightStore):
    """The tensors of a quantised model, under the names and in the shapes that they had before."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._stored = WeightStore(folder)
        self._four_bit: dict[str, _FourBit] = {}
        self._rows: dict[str, str] = {}
        for name in self._stored.tensors:
            weight, found, _ = name.partition(_STATE)
            if found:
                self._four_bit[weight] = self._state(name)
            elif name.endswith(".SCB"):
                self._rows[f"{name.removesuffix('.SCB')}.weight"] = name
        self.tensors = {name: self._described(name, info) for name, info in self._stored.tensors.items() if not self._is_part(name)}

    @property
    def across_rows(self) -> str | None:
        """A 4-bit weight whose blocks do not end with its rows, or None."""
        return next((name for name, state in self._four_bit.items() if state.shape[-1] % state.blocksize), None)

    def _is_part(self, name: str) -> bool:
        weight, _, part = name.rpartition(".")
        return _STATE in name or name.endswith((".SCB", ".weight_format")) or (part in _PARTS and weight in self._four_bit)

    def _described(self, name: str, info: TensorInfo) -> TensorInfo:
        if (state := self._four_bit.get(name)) is not None:
            return replace(info, dtype=torch.float32, shape=state.shape)
        if info.dtype == torch.int8 and name not in self._rows:
            raise ConfigError(_damaged(self.folder, f"{name} is in int8 and has no scale"))
        return replace(info, dtype=torch.float32) if name in self._rows else info

    def _state(self, name: str) -> _FourBit:
        try:
            values = json.loads(bytes(self._stored.read(name).tolist()))
            nested = {key: values[key] for key in ("nested_blocksize", "nested_offset") if key in values}
            state = _FourBit(tuple(values["shape"]), int(values["blocksize"]), **nested)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(_damaged(self.folder, f"{name} cannot be read ({type(error).__name__})")) from error
        weight = name.partition(_STATE)[0]
        needed = [weight, *(f"{weight}.{part}" for part in (_PARTS if nested else _PARTS[:2]))]
        if missing := [each for each in needed if each not in self._stored]:
            raise ConfigError(_damaged(self.folder, f"{weight} is in 4 bits, and {missing[0]} is in no file"))
        codes, blocks = self._stored.tensors[weight].nbytes, self._stored.tensors[f"{weight}.absmax"].shape
        numbers = math.prod(state.shape)
        if codes != (numbers + 1) // 2 or math.prod(blocks) != -(-numbers // state.blocksize):
            raise ConfigError(_damaged(self.folder, f"{weight} is {list(state.shape)}, and its codes or scales are of another size"))
        return state

    @property
    def quantized(self) -> list[str]:
        """Names of the quantised weights."""
        return [name for name in self.tensors if name in self._four_bit or name in self._rows]

    def packed(self, name: str, read: Callable[[str], Tensor] | None = None) -> Packed:
        """A quantised weight as it is stored; `read` may get codes in another way than copying them from the file."""
        codes, stored = (read or self._stored.read)(name), self._stored
        if (scale := self._rows.get(name)) is not None:
            return EightBit(self.tensors[name].shape, codes, stored.read(scale).float().reshape(-1))
        state, table = self._four_bit[name], stored.read(f"{name}.quant_map").float()
        flat, scales = codes.reshape(-1).view(torch.uint8), stored.read(f"{name}.absmax")
        if not state.nested_blocksize:
            return FourBit(state.shape, flat, table, scales.float(), state.blocksize)
        values, groups = (stored.read(f"{name}.{part}").float() for part in ("nested_quant_map", "nested_absmax"))
        return FourBit(state.shape, flat, table, scales, state.blocksize, values, groups, state.nested_blocksize, state.nested_offset)

    def read(self, name: str) -> Tensor:
        """The tensor; in float32 if it was quantised."""
        if name not in self._four_bit and name not in self._rows:
            return self._stored.read(name)
        weight = torch.empty(self.tensors[name].shape)
        self.packed(name).fill(weight)
        return weight


def _damaged(folder: Path, why: str) -> Problem:
    return Problem(code="model.unreadable", message=f"its quantised weights cannot be read: {why}", where=str(folder))
