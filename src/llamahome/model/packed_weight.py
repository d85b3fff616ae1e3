"""Frozen weights in 4 or 8 bits, in the layout of bitsandbytes, and a tensor that holds one and acts as the matrix that it stands for.

A 4-bit weight is two codes a byte, the first in the upper half. Its value is `table[code] * scale[block]`, where blocks run over rows; with
double quantisation the scales are codes of 8 bits, with a scale for every 256 of them and one offset. An int8 weight is
`number * row scale / 127`. Values are computed in float32 and rounded once. Nothing is widened before it is used, and then into one buffer
that the next layer uses again, so memory holds the packed weights and one layer in 16 or 32 bits.
Source: QLoRA, arXiv 2305.14314; LLM.int8(), arXiv 2208.07339.

Legend: O outputs, I inputs, B blocks.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_CHUNK = 1 << 20
"""Numbers that plain torch widens at once on a processor, so that its temporary copies stay in the cache."""
_OVER_127 = 1 / 127
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.linear.default, _aten.bmm.default, _aten.baddbmm.default}
"""Operations whose result shares no memory with their operands, so that these may lie in the buffer."""

Fill = Callable[["Packed", Tensor], None]
"""Fills a contiguous tensor on the processor with the values of a packed weight: backends/cpu/widen.py."""


@dataclass(frozen=True, eq=False)
class FourBit:
    """A weight in codes of 4 bits."""

    shape: tuple[int, ...]
    codes: Tensor
    """uint8, [O * I / 2]."""
    table: Tensor
    """float32 [16]: the value of each code."""
    scales: Tensor
    """[B]: float32, or uint8 codes of `scale_table`."""
    block: int
    """Numbers that share a scale."""
    scale_table: Tensor | None = None
    """float32 [256]."""
    scale_scales: Tensor | None = None
    """float32, one for every `scale_block` scales."""
    scale_block: int = 0
    offset: float = 0.0

    def scales_B(self) -> Tensor:
        """The scale of each block, float32."""
        if self.scale_table is None or self.scale_scales is None:
            return self.scales.float()
        each = self.scale_scales.repeat_interleave(self.scale_block)[: self.scales.numel()]
        return self.scale_table.index_select(0, self.scales.int()).mul_(each).add_(self.offset)

    def pairs(self) -> Tensor:
        """float32 [256, 2]: the values of both codes of a byte."""
        return torch.stack((self.table.repeat_interleave(16), self.table.repeat(16)), dim=1)

    def fill(self, out: Tensor) -> None:
        """Write all values into a contiguous tensor of any floating-point type."""
        flat, scales = out.view(-1), self.scales_B()
        pairs = self.pairs().view(torch.int64).view(-1)  # both numbers at once, which halves the look-ups
        step = self.codes.numel() if out.device.type != "cpu" else max(1, _CHUNK // (2 * self.block)) * self.block
        for start in range(0, self.codes.numel(), step):
            numbers = pairs.index_select(0, self.codes[start : start + step].int()).view(torch.float32)
            blocks = scales[2 * start // self.block : -(-2 * (start + step) // self.block)]
            if numbers.numel() % self.block:
                numbers.mul_(blocks.repeat_interleave(self.block)[: numbers.numel()])
            else:
                numbers.view(-1, self.block).mul_(blocks.unsqueeze(1))
            part = flat[2 * start : 2 * (start + step)]
            part.copy_(numbers[: part.numel()])  # an odd number of values ends within a byte


@dataclass(frozen=True, eq=False)
class EightBit:
    """A weight in int8 with a scale for each row."""

    shape: tuple[int, ...]
    numbers_OI: Tensor
    scales_O: Tensor
    """float32: the greatest absolute value of each row."""

    def steps_O(self) -> Tensor:
        """What one step of each row stands for, float32."""
        return self.scales_O * _OVER_127

    def fill(self, out: Tensor) -> None:
        """Write all values into a contiguous tensor of any floating-point type."""
        flat, scales = out.view(self.shape), self.steps_O().unsqueeze(1)
        step = self.shape[0] if out.device.type != "cpu" else max(1, _CHUNK // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            flat[rows].copy_(self.numbers_OI[rows].float().mul_(scales[rows]))


Packed = FourBit | EightBit


def packed_bytes(packed: Packed) -> int:
    """Bytes of codes, tables and scales."""
    return sum(value.nbytes for value in packed_tensors(packed).values())


def packed_tensors(packed: Packed) -> dict[str, Tensor]:
    """Codes, tables and scales by name."""
    values = {field.name: getattr(packed, field.name) for field in fields(packed)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def packed_to(packed: Packed, device: torch.device) -> Packed:
    """The same weight on `device`."""
    moved: dict[str, Any] = {name: value.to(device) for name, value in packed_tensors(packed).items()}
    return replace(packed, **moved)


class _Buffer(threading.local):
    """The memory of this thread into which packed weights are widened on a processor."""

    memory: Tensor | None = None

    def of(self, numbers: int, dtype: torch.dtype) -> Tensor:
        """`numbers` numbers of `dtype`, until the next call."""
        needed = numbers * dtype.itemsize
        if self.memory is None or self.memory.numel() < needed:
            self.memory = None
            self.memory = torch.empty(needed, dtype=torch.uint8)
        return self.memory[:needed].view(dtype)


_buffer = _Buffer()


class PackedWeight(Tensor):
    """A frozen [O, I] matrix in `dtype` whose numbers are kept packed: every operation that reads it gets the widened matrix.

    Autograd keeps the packed weight for the backward pass, not the widened one. Changing it in place is an error.
    """

    packed: Packed
    fill_by: Fill | None
    """Widens it on a processor instead of plain torch."""
    _transposed: bool

    @staticmethod
    def __new__(
        cls: type["PackedWeight"], packed: Packed, dtype: torch.dtype, fill_by: Fill | None = None, *, transposed: bool = False
    ) -> "PackedWeight":
        """The weight `packed` as a matrix of numbers of type `dtype`."""
        shape = packed.shape[::-1] if transposed else packed.shape
        device = next(iter(packed_tensors(packed).values())).device
        self: PackedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.packed, self.fill_by, self._transposed = packed, fill_by, transposed
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def scales(self) -> Tensor:
        """Its scales, float32: not finite if a value of the matrix is not."""
        return self.packed.scales_B() if isinstance(self.packed, FourBit) else self.packed.scales_O

    def fill(self, out: Tensor) -> None:
        """Write the matrix, [O, I] in the order of its rows, into a contiguous tensor."""
        if self.fill_by is not None and out.device.type == "cpu":
            self.fill_by(self.packed, out)
        else:
            self.packed.fill(out)

    def widened(self, *, in_buffer: bool = False) -> Tensor:
        """The matrix as a plain tensor, which in the buffer is valid until the next weight is widened there."""
        numbers = math.prod(self.packed.shape)
        here = _buffer.of(numbers, self.dtype) if in_buffer and self.device.type == "cpu" else None
        out = torch.empty(numbers, dtype=self.dtype, device=self.device) if here is None else here
        self.fill(out)
        matrix = out.view(self.packed.shape)
        return matrix.t() if self._transposed else matrix

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({type(self.packed).__name__}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Views that keep the matrix whole stay packed; everything else reads the widened matrix."""
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], PackedWeight) else None
        if first is not None and func in (_aten.detach.default, _aten.alias.default):
            return PackedWeight(first.packed, first.dtype, first.fill_by, transposed=first._transposed)
        if first is not None and func is _aten.t.default:
            return PackedWeight(first.packed, first.dtype, first.fill_by, transposed=not first._transposed)
        if first is not None and func is _aten._to_copy.default:
            packed = packed_to(first.packed, torch.device(kwargs.get("device") or first.device))
            return PackedWeight(packed, kwargs.get("dtype") or first.dtype, first.fill_by, transposed=first._transposed)
        if func._schema.is_mutable and any(isinstance(arg, PackedWeight) for arg in args[:1]):
            raise RuntimeError(f"{func} would change a packed weight, which is frozen")
        packed_arguments = sum(isinstance(arg, PackedWeight) for arg in args)
        in_buffer = func in _PRODUCTS and packed_arguments == 1
        args, kwargs = tree_map_only(PackedWeight, lambda weight: weight.widened(in_buffer=in_buffer), (args, kwargs))
        return func(*args, **kwargs)


def widened_rows(weights: Sequence[Tensor]) -> Tensor:
    """The matrices, packed or not, one below the other, [all O, I], in the buffer: valid until the next weight is widened there."""
    rows, width, dtype = [weight.shape[0] for weight in weights], weights[0].shape[1], weights[0].dtype
    out = _buffer.of(sum(rows) * width, dtype).view(sum(rows), width)
    for weight, part in zip(weights, torch.split(out, rows), strict=True):
        if isinstance(weight, PackedWeight):
            weight.fill(part)
        else:
            part.copy_(weight)
    return out


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Every packed weight of `model` with its name."""
    return ((name, weight) for name, weight in model.named_parameters() if isinstance(weight, PackedWeight))


def widened_bytes(model: nn.Module) -> int:
    """Bytes that the packed weights of `model` would take as plain matrices."""
    return sum(weight.numel() * weight.dtype.itemsize for _, weight in packed_weights(model))


def widen_all(model: nn.Module) -> None:
    """Replace every packed weight by the matrix that it stands for."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, PackedWeight):
            module._parameters["weight"] = nn.Parameter(weight.widened(), requires_grad=False)
