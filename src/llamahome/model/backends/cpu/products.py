"""Products of the linear layers: a stack of matrices read where it lies, the low-rank path of adapters in the same sums.

Products are our own (products.cpp) in float32 and, where the processor multiplies pairs of bfloat16, in that: a tenth to a half faster
than torch's for the sizes of small decoders on two cores (docs/log.md), whatever the number of tokens and however the matrices lie.
Nothing is joined or turned beforehand, and sums stay in float32 to their end. Everywhere else the same words are PyTorch's.
tests/model/backends/cpu/test_products.py holds the two together.

Legend: T tokens, I inputs, O rows of the stack, R rank, N and M columns.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices [rows, I] below each other, [O, I] together; each contiguous."""

    parts: Sequence[Tensor]

    @functools.cached_property
    def addresses(self) -> Tensor:
        """Where they lie; a tensor that is only imagined has no such place, and our own products are not asked for it."""
        return torch.tensor([part.data_ptr() for part in self.parts])

    @functools.cached_property
    def heights(self) -> Tensor:
        """Rows of each."""
        return torch.tensor([part.shape[0] for part in self.parts])

    @property
    def rows(self) -> int:
        """O."""
        return sum(part.shape[0] for part in self.parts)

    @property
    def width(self) -> int:
        """I."""
        return self.parts[0].shape[1]


def multiplies(kernels: Kernels | None, parts: Sequence[Tensor]) -> bool:
    """Whether our own products take these matrices: one type that this processor multiplies, contiguous; bfloat16 in whole pairs."""
    dtype = parts[0].dtype
    alike = all(part.is_contiguous() and part.dtype == dtype and part.device.type == "cpu" for part in parts)
    even = all(part.shape[1] % 2 == 0 for part in parts) and sum(part.shape[0] for part in parts) % 2 == 0
    return kernels is not None and alike and kernels.has("product", dtype) and (even or dtype != torch.bfloat16)


def product(x: Tensor, stack: Stack, *, turned: bool, kernels: Kernels | None, bias: Tensor | None = None) -> Tensor:
    """x [T, I] times the turned stack -> [T, O], or x [T, O] times the stack -> [T, I]; plus bias [columns].

    With kernels: what `multiplies` allows, and x in its type; bias in float32.
    """
    if kernels is None:
        return _plain_product(x, stack, turned, None if bias is None else bias.to(x.dtype))
    x = _rows(x)
    out = x.new_empty(x.shape[0], stack.rows if turned else stack.width)
    kernels("product", (x.dtype,), x, x.stride(0), *_sides(stack, turned), bias, out, x.shape[0])
    return out


def adapted_product(
    x: Tensor, stack: Stack, first_RI: Tensor, second_RO: Tensor, *, turned: bool, kernels: Kernels | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """low [T, R] = x times the turned first factor, and `product` plus low times the second; sums stay in float32 to their end.

    I and O of the factors are the inputs and the columns of this product. With kernels: both contiguous in the type of x, R even.
    """
    if kernels is None:
        low = F.linear(x, first_RI)
        return low, product(x, stack, turned=turned, kernels=None, bias=bias).addmm_(low, second_RO)
    x, rank = _rows(x), first_RI.shape[0]
    low, out = x.new_empty(x.shape[0], rank), x.new_empty(x.shape[0], second_RO.shape[1])
    sides = _sides(stack, turned)
    kernels("adapted_product", (x.dtype,), x, x.stride(0), *sides, first_RI, second_RO, rank, bias, low, out, x.shape[0])
    return low, out


def outer_product(left_TN: Tensor, right_TM: Tensor, *, kernels: Kernels | None, out: Tensor | None = None) -> Tensor:
    """Sum over tokens of left by right, [N, M], added to `out` when it is given: the gradient of a weight.

    The result is float32 with kernels, and `out` is; without, it has the type of the inputs. The wider side belongs on the right.
    """
    if kernels is None:
        product_NM = left_TN.t() @ right_TM
        return product_NM if out is None else out.add_(product_NM)
    left_TN, right_TM = _rows(left_TN), _rows(right_TM)
    add, out = (0, torch.empty(left_TN.shape[1], right_TM.shape[1])) if out is None else (1, out)
    sides = left_TN, left_TN.stride(0), left_TN.shape[1], right_TM, right_TM.stride(0), right_TM.shape[1]
    kernels("outer_product", (left_TN.dtype,), *sides, out, add, left_TN.shape[0])
    return out


def _plain_product(x: Tensor, stack: Stack, turned: bool, bias: Tensor | None) -> Tensor:
    if len(stack.parts) == 1:
        return F.linear(x, stack.parts[0] if turned else stack.parts[0].t(), bias)
    if turned:
        out = torch.cat([F.linear(x, part) for part in stack.parts], 1)
    else:
        sides = torch.split(x, [part.shape[0] for part in stack.parts], 1)
        out = sides[0] @ stack.parts[0]
        for side, part in zip(sides[1:], stack.parts[1:], strict=True):
            out.addmm_(side, part)
    return out if bias is None else out.add_(bias)


def _sides(stack: Stack, turned: bool) -> tuple[Tensor, Tensor, int, int, int]:
    return stack.addresses, stack.heights, len(stack.parts), stack.width, int(turned)


def _rows(x: Tensor) -> Tensor:
    """Rows without gaps inside, whole pairs of bfloat16 apart."""
    whole = x.dtype != torch.bfloat16 or x.stride(0) % 2 == 0
    return x if x.stride(1) == 1 and whole and x.stride(0) >= x.shape[1] else x.contiguous()
