"""Norm, gate and rotation of a decoder layer as single passes over memory, with backward passes of their own.

What is cheap to compute again is not kept: the norm keeps its input and one number per row, the gate its input, the rotation nothing.
A linear layer that reads a norm or a gate (linears.py) keeps its sources in the place of what it reads, and gets this again from
the same pass over memory that turns the gradient. All work on the compiled kernels (native.py); a `plain_` twin in PyTorch's words
says what is meant and is what tests compare with.

Legend: T tokens, D hidden size, F feed-forward size, H query heads, K key heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels

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


@dataclass(frozen=True)
class AsItIs:
    """A product reads what is kept."""

    def read(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the product reads, and what is to be kept besides the sources."""
        return x, ()

    def back(
        self, grad: Tensor | None, x: Tensor, *, wanted: Sequence[bool], again: bool
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """What was read, when it is needed `again`, and the gradients of the sources."""
        return x, (grad,)


@dataclass(frozen=True)
class Normed:
    """A product reads the norm of what is kept, [T, D] and a weight [D]."""

    how: Norm
    kernels: Kernels

    def read(self, x: Tensor, weight_D: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the product reads, and one number per row to be kept."""
        size = x.shape[-1]
        weight = weight_D.float() + self.how.offset
        out = torch.empty_like(x, dtype=self.how.dtype or x.dtype)
        inverse = torch.empty(x.numel() // size, dtype=torch.float32)
        self.kernels("norm_forward", (x.dtype, out.dtype), x, weight, out, inverse, inverse.numel(), size, self.how.eps)
        return out, (inverse,)

    def back(
        self, grad: Tensor | None, x: Tensor, weight_D: Tensor, inverse: Tensor, *, wanted: Sequence[bool], again: bool
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """What was read, when it is needed `again`, and the gradients of x and of the weight."""
        if grad is None:
            return self.read(x, weight_D)[0] if again else None, (None, None)
        grad, size = grad.contiguous(), x.shape[-1]
        weight = weight_D.float() + self.how.offset
        grad_x = torch.empty_like(x) if wanted[0] else None
        partial = torch.zeros(_CHUNKS, size, dtype=torch.float32) if wanted[1] else None
        out = torch.empty_like(grad) if again else None
        chunks = _CHUNKS if partial is not None else inverse.numel()
        types = (x.dtype, grad.dtype)
        self.kernels("norm_backward", types, grad, x, weight, inverse, grad_x, partial, out, chunks, inverse.numel(), size)
        return out, (grad_x, None if partial is None else partial.sum(0).to(weight_D.dtype))


@dataclass(frozen=True)
class Gated:
    """A product reads the gated [T, F] of what is kept, [T, 2F].

    What is made again takes the place of the gradient that comes in, and the gradient that of what was kept: memory that is read anyway
    costs nothing to write.
    """

    kind: str
    kernels: Kernels

    def read(self, both: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the product reads; nothing is kept besides."""
        size = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], size)
        self.kernels("gated_forward", (both.dtype,), both, out, out.numel() // size, size, GATES.index(self.kind))
        return out, ()

    def back(
        self, grad: Tensor | None, both: Tensor, *, wanted: Sequence[bool], again: bool
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """What was read, when it is needed `again`, and the gradient of both halves."""
        if grad is None:
            return self.read(both)[0] if again else None, (None,)
        grad, size = grad.contiguous(), both.shape[-1] // 2
        grad_both, out = (both, grad) if again else (torch.empty_like(both), None)
        sizes = grad.numel() // size, size, GATES.index(self.kind)
        self.kernels("gated_backward", (both.dtype,), grad, both, grad_both, out, *sizes)
        return out, (grad_both,)


Reading = AsItIs | Normed | Gated
"""How what a product reads is made of its sources, which are kept for the backward pass in its place."""


class _Read(torch.autograd.Function):
    """What would be read, by itself."""

    @staticmethod
    def forward(ctx: Any, reading: Reading, *sources: Tensor) -> Tensor:
        sources = tuple(source.contiguous() for source in sources)
        out, kept = reading.read(*sources)
        ctx.save_for_backward(*sources, *kept)
        ctx.reading = reading
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, found = ctx.reading.back(gradients[0], *ctx.saved_tensors, wanted=ctx.needs_input_grad[1:], again=False)
        return None, *found


class _Rotation(torch.autograd.Function):
    """From the columns [q | k | v] of one product to q [T, H, E] and k [T, K, E], turned, and v [T, K, E]; and all three gradients back."""

    @staticmethod
    def forward(
        ctx: Any, all_TO: Tensor, cosine_TE: Tensor, sine_TE: Tensor, heads: tuple[int, int], kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, size = cosine_TE.shape
        q, k, v = (all_TO.new_empty(tokens, count, size) for count in (heads[0], heads[1], heads[1]))
        types, angles = (all_TO.dtype, cosine_TE.dtype), (cosine_TE, sine_TE)
        kernels("rotate", types, all_TO, q, k, v, *angles, tokens, *heads, size, 0)
        ctx.save_for_backward(*angles)  # all layers share them
        ctx.heads, ctx.kernels = heads, kernels
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        cosine_TE, sine_TE = ctx.saved_tensors
        tokens, size = cosine_TE.shape
        grad = gradients[0].new_empty(tokens, (ctx.heads[0] + 2 * ctx.heads[1]) * size)
        parts = (part.contiguous() for part in gradients)
        ctx.kernels("rotate", (grad.dtype, cosine_TE.dtype), grad, *parts, cosine_TE, sine_TE, tokens, *ctx.heads, size, 1)
        return grad, None, None, None, None


def norm(x: Tensor, weight_D: Tensor, how: Norm, kernels: Kernels) -> Tensor:
    """`plain_norm` in one pass; x [..., D]."""
    result: Tensor = _Read.apply(Normed(how, kernels), x, weight_D)  # type: ignore[no-untyped-call]
    return result


def gated(both: Tensor, kind: str, kernels: Kernels) -> Tensor:
    """`plain_gate` in one pass; both [..., 2F] -> [..., F]."""
    result: Tensor = _Read.apply(Gated(kind, kernels), both)  # type: ignore[no-untyped-call]
    return result


def rotated(
    all_TO: Tensor, cosine_TE: Tensor, sine_TE: Tensor, *, heads: tuple[int, int], kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [q | k | v] columns into heads and apply `plain_rotation` to q and k; `heads` of queries and keys."""
    known = cosine_TE.dtype in (torch.float32, all_TO.dtype)
    cosine_TE, sine_TE = ((angle if known else angle.float()).contiguous() for angle in (cosine_TE, sine_TE))
    result: tuple[Tensor, Tensor, Tensor] = _Rotation.apply(all_TO.contiguous(), cosine_TE, sine_TE, heads, kernels)  # type: ignore[no-untyped-call]
    return result
