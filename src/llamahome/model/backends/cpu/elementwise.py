"""RMS norm, gated activation and rotary embedding of a decoder layer, each one pass over memory, with backward passes of their own.

What is cheap to recompute is not kept: the norm keeps its input and one number per row, the gate its input, the rotation nothing. A linear
layer whose input is a norm or a gate (merged_linear.py) keeps the sources of that input instead, and its backward pass recomputes the input
in the same pass over memory that computes the gradient. All use the compiled kernels (native.py); the `plain_` functions define the
operations in PyTorch, and the tests compare both.

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
"""The gradient of a norm's weight is summed over this many chunks of rows, then over the chunks. The number is fixed, so that the number of
threads does not change the bits."""
GATES = ("silu", "gelu_tanh")
"""Activations, in the order of their numbers in kernels.cpp."""


@dataclass(frozen=True)
class NormOptions:
    """The parameters of a root-mean-square norm."""

    eps: float
    offset: float
    """Added to the weight; Gemma stores the weight minus 1."""
    dtype: torch.dtype | None
    """dtype of the result; None for that of the input."""


def plain_norm(x: Tensor, weight_D: Tensor, options: NormOptions) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), computed in float32."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + options.eps)
    return (normalized * (weight_D.float() + options.offset)).to(options.dtype or x.dtype)


def plain_gate(gate_up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up for [..., 2F] = [gate, up]."""
    gate, up = gate_up.float().chunk(2, -1)
    return ((F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up).to(gate_up.dtype)


@dataclass(frozen=True)
class Identity:
    """The input of a product is its source."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input of the product, and tensors to keep beside the sources."""
        return x, ()

    def backward(
        self, grad: Tensor | None, x: Tensor, *, needs_grad: Sequence[bool], recompute: bool
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """The input of the product, if `recompute`, and the gradients of the sources."""
        return x, (grad,)


@dataclass(frozen=True)
class RmsNorm:
    """The input of a product is the norm of x [T, D] with a weight [D]."""

    options: NormOptions
    kernels: Kernels

    def forward(self, x: Tensor, weight_D: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The norm, and one number per row to keep."""
        size = x.shape[-1]
        weight = weight_D.float() + self.options.offset
        out = torch.empty_like(x, dtype=self.options.dtype or x.dtype)
        inverse = torch.empty(x.numel() // size, dtype=torch.float32)
        self.kernels("norm_forward", (x.dtype, out.dtype), x, weight, out, inverse, inverse.numel(), size, self.options.eps)
        return out, (inverse,)

    def backward(
        self, grad: Tensor | None, x: Tensor, weight_D: Tensor, inverse: Tensor, *, needs_grad: Sequence[bool], recompute: bool
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """The norm, if `recompute`, and the gradients of x and of the weight."""
        if grad is None:
            return self.forward(x, weight_D)[0] if recompute else None, (None, None)
        grad, size = grad.contiguous(), x.shape[-1]
        weight = weight_D.float() + self.options.offset
        grad_x = torch.empty_like(x) if needs_grad[0] else None
        partial = torch.zeros(_CHUNKS, size, dtype=torch.float32) if needs_grad[1] else None
        out = torch.empty_like(grad) if recompute else None
        chunks = _CHUNKS if partial is not None else inverse.numel()
        dtypes = (x.dtype, grad.dtype)
        self.kernels("norm_backward", dtypes, grad, x, weight, inverse, grad_x, partial, out, chunks, inverse.numel(), size)
        return out, (grad_x, None if partial is None else partial.sum(0).to(weight_D.dtype))


@dataclass(frozen=True)
class GatedActivation:
    """The input of a product is activation(gate) * up [T, F] of [gate, up] [T, 2F].

    The backward pass writes the recomputed input over the incoming gradient, and the outgoing gradient over the source, because memory that
    was just read is cheap to write.
    """

    kind: str
    kernels: Kernels
    overwrites: bool = True
    """Whether nothing else needs the source after this backward pass."""

    def forward(self, gate_up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gated activation; nothing to keep beside the source."""
        size = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], size)
        self.kernels("gated_forward", (gate_up.dtype,), gate_up, out, out.numel() // size, size, GATES.index(self.kind))
        return out, ()

    def backward(
        self, grad: Tensor | None, gate_up: Tensor, *, needs_grad: Sequence[bool], recompute: bool
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """The gated activation, if `recompute`, and the gradient of the source."""
        if grad is None:
            return self.forward(gate_up)[0] if recompute else None, (None,)
        grad, size = grad.contiguous(), gate_up.shape[-1] // 2
        grad_gate_up = gate_up if recompute and self.overwrites else torch.empty_like(gate_up)
        out = grad if recompute else None
        sizes = grad.numel() // size, size, GATES.index(self.kind)
        self.kernels("gated_backward", (gate_up.dtype,), grad, gate_up, grad_gate_up, out, *sizes)
        return out, (grad_gate_up,)


InputTransform = Identity | RmsNorm | GatedActivation
"""Computes the input of a product from its sources. The backward pass keeps the sources instead of the input."""


class Transform(torch.autograd.Function):
    """An input transform by itself, without a product."""

    @staticmethod
    def forward(ctx: Any, transform: InputTransform, *sources: Tensor) -> Tensor:
        """Compute the input."""
        sources = tuple(source.contiguous() for source in sources)
        out, kept = transform.forward(*sources)
        ctx.save_for_backward(*sources, *kept)
        ctx.transform = transform
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the sources."""
        _, grads = ctx.transform.backward(gradients[0], *ctx.saved_tensors, needs_grad=ctx.needs_input_grad[1:], recompute=False)
        return None, *grads


class _Rotation(torch.autograd.Function):
    """Splits columns [q | k | v] into heads: rotated q [T, H, E] and k [T, K, E], and v [T, K, E]."""

    @staticmethod
    def forward(
        ctx: Any, qkv_TO: Tensor, cosine_TE: Tensor, sine_TE: Tensor, heads: tuple[int, int], kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, size = cosine_TE.shape
        q, k, v = (qkv_TO.new_empty(tokens, count, size) for count in (heads[0], heads[1], heads[1]))
        dtypes, angles = (qkv_TO.dtype, cosine_TE.dtype), (cosine_TE, sine_TE)
        kernels("rotate", dtypes, qkv_TO, q, k, v, *angles, tokens, *heads, size, 0)
        ctx.save_for_backward(*angles)  # shared by all layers
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


def rms_norm(x: Tensor, weight_D: Tensor, options: NormOptions, kernels: Kernels) -> Tensor:
    """`plain_norm` by kernels; x [..., D]."""
    result: Tensor = Transform.apply(RmsNorm(options, kernels), x, weight_D)  # type: ignore[no-untyped-call]
    return result


def rotate_heads(
    qkv_TO: Tensor, cosine_TE: Tensor, sine_TE: Tensor, *, heads: tuple[int, int], kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Split columns [q | k | v] into heads and rotate q and k as Llama does; `heads` is the number of query and key heads."""
    supported = cosine_TE.dtype in (torch.float32, qkv_TO.dtype)
    cosine_TE, sine_TE = ((angle if supported else angle.float()).contiguous() for angle in (cosine_TE, sine_TE))
    result: tuple[Tensor, Tensor, Tensor] = _Rotation.apply(qkv_TO.contiguous(), cosine_TE, sine_TE, heads, kernels)  # type: ignore[no-untyped-call]
    return result
