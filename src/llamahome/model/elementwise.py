"""Norm, gate and rotation of a decoder layer as single passes over memory, with backward passes of their own.

What is cheap to compute again is not kept: the norm keeps its input and one number per row, the gate its input, the rotation nothing.
Each works on the compiled kernels (model/native.py); a `plain_` twin in PyTorch's words says what is meant and is what tests compare with.

Legend: T tokens, D hidden size, F feed-forward size, H query heads, K key heads, E head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamahome.model.native import Kernels

_CHUNKS = 16
"""The norm's weight gradient is summed over this many parts of the rows, then over the parts: fixed, so threads do not change the bits."""
GATES = ("silu", "gelu_tanh")
"""In the order of their numbers in kernels.cpp."""


@dataclass(frozen=True)
class Norm:
    """How a root-mean-square norm is computed."""

    eps: float
    offset: float
    """Added to the weight: Gemma stores it less one."""
    dtype: torch.dtype | None
    """Of the result; None is that of the input."""


def plain_norm(x: Tensor, weight_D: Tensor, how: Norm) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), worked out in float32."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + how.eps)
    return (normal * (weight_D.float() + how.offset)).to(how.dtype or x.dtype)


def plain_gate(both: Tensor, kind: str) -> Tensor:
    """gate(a) * b for [..., 2F] = [a, b]."""
    a, b = both.float().chunk(2, -1)
    return ((F.silu(a) if kind == "silu" else F.gelu(a, approximate="tanh")) * b).to(both.dtype)


def plain_rotation(x_THE: Tensor, cosine_TE: Tensor, sine_TE: Tensor) -> Tensor:
    """Rotary positions as in Llama: pairs (i, i + E/2) turned by their token's angles."""
    a, b = x_THE.float().chunk(2, -1)
    turned = x_THE.float() * cosine_TE[:, None].float() + torch.cat([-b, a], -1) * sine_TE[:, None].float()
    return turned.to(x_THE.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, how: Norm, kernels: Kernels) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1]
        weight = weight_D.float() + how.offset
        out = torch.empty_like(x, dtype=how.dtype or x.dtype)
        inverse = torch.empty(x.numel() // size, dtype=torch.float32)
        kernels("norm_forward", (x.dtype, out.dtype), x, weight, out, inverse, inverse.numel(), size, how.eps)
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.how, ctx.kernels = how, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        grad, size = gradients[0].contiguous(), x.shape[-1]
        weight = weight_D.float() + ctx.how.offset
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        partial = torch.zeros(_CHUNKS, size, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        chunks = _CHUNKS if partial is not None else inverse.numel()
        types = (x.dtype, grad.dtype)
        ctx.kernels("norm_backward", types, grad, x, weight, inverse, grad_x, partial, chunks, inverse.numel(), size)
        return grad_x, None if partial is None else partial.sum(0).to(weight_D.dtype), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, kind: str, kernels: Kernels) -> Tensor:
        both = both.contiguous()
        size = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], size)
        kernels("gated_forward", (both.dtype,), both, out, out.numel() // size, size, GATES.index(kind))
        ctx.save_for_backward(both)
        ctx.kind, ctx.kernels = kind, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (both,) = ctx.saved_tensors
        grad, size = gradients[0].contiguous(), both.shape[-1] // 2
        grad_both = torch.empty_like(both)
        ctx.kernels("gated_backward", (both.dtype,), grad, both, grad_both, grad.numel() // size, size, GATES.index(ctx.kind))
        return grad_both, None, None


class _Rotation(torch.autograd.Function):
    """From the columns [q | k | v] of one product to q [T, H, E] and k [T, K, E], turned, and v [T, K, E]; and all three gradients back."""

    @staticmethod
    def forward(
        ctx: Any, all_TO: Tensor, cosine_TE: Tensor, sine_TE: Tensor, heads: tuple[int, int], kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, size = cosine_TE.shape
        query, key = heads
        q, k = all_TO.new_empty(tokens, query, size), all_TO.new_empty(tokens, key, size)
        for out, first, count in ((q, 0, query), (k, query, key)):
            columns = all_TO[:, first * size :]
            kernels("rotate", (all_TO.dtype,), columns, out, cosine_TE, sine_TE, tokens, count, size, all_TO.stride(0), count * size, 1.0)
        ctx.save_for_backward(cosine_TE, sine_TE)
        ctx.heads, ctx.kernels = heads, kernels
        return q, k, all_TO[:, (query + key) * size :].reshape(tokens, key, size).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        cosine_TE, sine_TE = ctx.saved_tensors
        tokens, size = cosine_TE.shape
        query, key = ctx.heads
        grad = gradients[0].new_empty(tokens, (query + 2 * key) * size)
        for part, first, count in ((gradients[0], 0, query), (gradients[1], query, key)):
            columns, part = grad[:, first * size :], part.contiguous()
            ctx.kernels("rotate", (grad.dtype,), part, columns, cosine_TE, sine_TE, tokens, count, size, count * size, grad.stride(0), -1.0)
        grad[:, (query + key) * size :] = gradients[2].reshape(tokens, key * size)
        return grad, None, None, None, None


def norm(x: Tensor, weight_D: Tensor, how: Norm, kernels: Kernels) -> Tensor:
    """`plain_norm` in one pass; x [..., D]."""
    result: Tensor = _Norm.apply(x, weight_D, how, kernels)  # type: ignore[no-untyped-call]
    return result


def gated(both: Tensor, kind: str, kernels: Kernels) -> Tensor:
    """`plain_gate` in one pass; both [..., 2F] -> [..., F]."""
    result: Tensor = _Gate.apply(both, kind, kernels)  # type: ignore[no-untyped-call]
    return result


def rotated(
    all_TO: Tensor, cosine_TE: Tensor, sine_TE: Tensor, *, heads: tuple[int, int], kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [q | k | v] columns into heads and apply `plain_rotation` to q and k; angles in float32, `heads` of queries and keys."""
    result: tuple[Tensor, Tensor, Tensor] = _Rotation.apply(all_TO.contiguous(), cosine_TE, sine_TE, heads, kernels)  # type: ignore[no-untyped-call]
    return result
