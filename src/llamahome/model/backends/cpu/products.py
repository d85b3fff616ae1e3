"""Products of the linear layers: a stack of matrices read where it lies, the low-rank path of adapters in the same sums.

Where the processor has the instructions, bfloat16 products are our own (products.cpp): a tenth to a half faster than torch's for the sizes
of small decoders on two cores (docs/log.md), whatever the number of tokens. Nothing is joined or turned beforehand, and sums stay in
float32 to their end. Everywhere else the same words are PyTorch's.
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
    """Whether our own products take these matrices: bfloat16, contiguous, an even number of inputs and of rows."""
    even = all(part.shape[1] % 2 == 0 for part in parts) and sum(part.shape[0] for part in parts) % 2 == 0
    alike = all(part.is_contiguous() and part.dtype == torch.bfloat16 and part.device.type == "cpu" for part in parts)
    return kernels is not None and even and alike and kernels.has("product", torch.bfloat16)


def product(x: Tensor, stack: Stack, *, turned: bool, kernels: Kernels | None, bias: Tensor | None = None) -> Tensor:
    """x [T, I] times the turned stack -> [T, O], or x [T, O] times the stack -> [T, I]; plus bias [columns].

    With kernels: what `multiplies` allows, and x in bfloat16; bias in float32. Without: one matrix in the stack.
    """
    if kernels is None:
        (whole,) = stack.parts
        return F.linear(x, whole if turned else whole.t(), None if bias is None else bias.to(x.dtype))
    x = _rows(x)
    out = x.new_empty(x.shape[0], stack.rows if turned else stack.width)
    kernels("product", (torch.bfloat16,), x, x.stride(0), *_sides(stack, turned), bias, out, x.shape[0])
    return out


def adapted_product(
    x: Tensor, stack: Stack, first_RI: Tensor, second_RO: Tensor, *, turned: bool, kernels: Kernels | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """low [T, R] = x times the turned first factor, and `product` plus low times the second; sums stay in float32 to their end.

    I and O of the factors are the inputs and the columns of this product. With kernels: both contiguous in bfloat16, R even.
    """
    if kernels is None:
        low = F.linear(x, first_RI)
        return low, product(x, stack, turned=turned, kernels=None, bias=bias).addmm_(low, second_RO)
    x, rank = _rows(x), first_RI.shape[0]
    low, out = x.new_empty(x.shape[0], rank), x.new_empty(x.shape[0], second_RO.shape[1])
    sides = _sides(stack, turned)
    kernels("adapted_product", (torch.bfloat16,), x, x.stride(0), *sides, first_RI, second_RO, rank, bias, low, out, x.shape[0])
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
    kernels("outer_product", (torch.bfloat16,), *sides, out, add, left_TN.shape[0])
    return out


def _sides(stack: Stack, turned: bool) -> tuple[Tensor, Tensor, int, int, int]:
    return stack.addresses, stack.heights, len(stack.parts), stack.width, int(turned)


def _rows(x: Tensor) -> Tensor:
    """Rows without gaps inside, an even distance apart."""
    return x if x.stride(1) == 1 and x.stride(0) % 2 == 0 and x.stride(0) >= x.shape[1] else x.contiguous()
