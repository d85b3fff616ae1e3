"""Matrix products of the linear layers: stacked weights are read in place, and adapters are added to the same sums.

The kernels (products.cpp) multiply float32 and, with AVX512_BF16, bfloat16. They are a tenth to a half faster than torch for the sizes of
small decoders on two cores (docs/log.md), for any number of tokens and any strides. They need no concatenated or transposed copies, and
sums stay in float32 to the end. Without kernels the same operations run in PyTorch. tests/model/backends/cpu/test_products.py compares
both.

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
    """Contiguous matrices [rows, I] that act as one matrix [O, I]."""

    parts: Sequence[Tensor]

    @functools.cached_property
    def addresses(self) -> Tensor:
        """The address of each matrix; fake tensors have none, and the kernels are not used for them."""
        return torch.tensor([part.data_ptr() for part in self.parts])

    @functools.cached_property
    def heights(self) -> Tensor:
        """The number of rows of each matrix."""
        return torch.tensor([part.shape[0] for part in self.parts])

    @property
    def rows(self) -> int:
        """O."""
        return sum(part.shape[0] for part in self.parts)

    @property
    def width(self) -> int:
        """I."""
        return self.parts[0].shape[1]


def can_multiply(kernels: Kernels | None, parts: Sequence[Tensor]) -> bool:
    """Whether the kernels support these matrices: one supported dtype, contiguous, on the processor; even sizes in bfloat16."""
    dtype = parts[0].dtype
    uniform = all(part.is_contiguous() and part.dtype == dtype and part.device.type == "cpu" for part in parts)
    even = all(part.shape[1] % 2 == 0 for part in parts) and sum(part.shape[0] for part in parts) % 2 == 0
    return kernels is not None and uniform and kernels.has("product", dtype) and (even or dtype != torch.bfloat16)


def product(x: Tensor, stack: Stack, *, transposed: bool, kernels: Kernels | None, bias: Tensor | None = None) -> Tensor:
    """x [T, I] times the transposed stack -> [T, O], or x [T, O] times the stack -> [T, I]; plus bias [columns].

    With kernels, `can_multiply` must hold for the stack, x must have its dtype, and bias must be float32.
    """
    if kernels is None:
        return _plain_product(x, stack, transposed, None if bias is None else bias.to(x.dtype))
    x = _aligned_rows(x)
    out = x.new_empty(x.shape[0], stack.rows if transposed else stack.width)
    kernels("product", (x.dtype,), x, x.stride(0), *_stack_arguments(stack, transposed), bias, out, x.shape[0])
    return out


def adapted_product(
    x: Tensor, stack: Stack, first_RI: Tensor, second_RO: Tensor, *, transposed: bool, kernels: Kernels | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """low [T, R] = x times the transposed first factor, and `product` plus low times the second factor.

    I and O of the factors are the inputs and columns of this product. With kernels, both factors must be contiguous in the dtype of x, and
    R even; sums stay in float32 to the end.
    """
    if kernels is None:
        low = F.linear(x, first_RI)
        return low, product(x, stack, transposed=transposed, kernels=None, bias=bias).addmm_(low, second_RO)
    x, rank = _aligned_rows(x), first_RI.shape[0]
    low, out = x.new_empty(x.shape[0], rank), x.new_empty(x.shape[0], second_RO.shape[1])
    matrices = _stack_arguments(stack, transposed)
    kernels("adapted_product", (x.dtype,), x, x.stride(0), *matrices, first_RI, second_RO, rank, bias, low, out, x.shape[0])
    return low, out


def outer_product(left_TN: Tensor, right_TM: Tensor, *, kernels: Kernels | None, out: Tensor | None = None) -> Tensor:
    """Transposed left times right, [N, M], the gradient of a weight; added to `out` if it is given.

    With kernels, the result and `out` are float32; without, the result has the dtype of the inputs. It is faster with the wider matrix on
    the right.
    """
    if kernels is None:
        product_NM = left_TN.t() @ right_TM
        return product_NM if out is None else out.add_(product_NM)
    left_TN, right_TM = _aligned_rows(left_TN), _aligned_rows(right_TM)
    add, out = (0, torch.empty(left_TN.shape[1], right_TM.shape[1])) if out is None else (1, out)
    operands = left_TN, left_TN.stride(0), left_TN.shape[1], right_TM, right_TM.stride(0), right_TM.shape[1]
    kernels("outer_product", (left_TN.dtype,), *operands, out, add, left_TN.shape[0])
    return out


def _plain_product(x: Tensor, stack: Stack, transposed: bool, bias: Tensor | None) -> Tensor:
    if len(stack.parts) == 1:
        return F.linear(x, stack.parts[0] if transposed else stack.parts[0].t(), bias)
    if transposed:
        out = torch.cat([F.linear(x, part) for part in stack.parts], 1)
    else:
        columns = torch.split(x, [part.shape[0] for part in stack.parts], 1)
        out = columns[0] @ stack.parts[0]
        for column, part in zip(columns[1:], stack.parts[1:], strict=True):
            out.addmm_(column, part)
    return out if bias is None else out.add_(bias)


def _stack_arguments(stack: Stack, transposed: bool) -> tuple[Tensor, Tensor, int, int, int]:
    return stack.addresses, stack.heights, len(stack.parts), stack.width, int(transposed)


def _aligned_rows(x: Tensor) -> Tensor:
    """x with contiguous rows, whose stride is even in bfloat16; copied only if necessary."""
    even = x.dtype != torch.bfloat16 or x.stride(0) % 2 == 0
    return x if x.stride(1) == 1 and even and x.stride(0) >= x.shape[1] else x.contiguous()
