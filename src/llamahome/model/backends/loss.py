"""The loss head: from hidden states of target positions to a summed cross entropy, never holding [tokens, vocabulary] at once.

Logits are computed in tiles of rows; the gradient with respect to hidden states (and to the head's weights, when they are trained) is
computed in the same pass, so the backward pass only scales it. Memory: one tile of logits (25 to 50 MB) and one gradient the size
of the inputs. The result is a *sum* in float32: dividing by the global number of targets is the step's business.

Legend: N target positions, R rows of a tile, V vocabulary, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.products import Stack, multiplies, outer_product, product

_TILE_LOGITS = 128 * 49_152
"""Of a tile; as float32 25 MB, within a large cache."""
_COMPILED_TILE_LOGITS = 4 * _TILE_LOGITS
"""bfloat16 all the way, 50 MB: more rows share the reading and packing of the head's weights, which takes longer than the cache saves."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    """Logits are multiplied by this (Cohere, Granite)."""
    softcap: float | None = None
    """Then squashed to softcap * tanh(logits / softcap) (Gemma 2)."""


@dataclass(frozen=True)
class HeadStats:
    """Sums over target positions, on the device."""

    loss_sum: Tensor
    """() float32, nats."""
    correct: Tensor
    """() int64, targets that the model ranks first."""


def _tile_rows(count: int, vocabulary: int, logits: int) -> int:
    """Rows of tiles as equal as can be, of at most so many `logits`."""
    tiles = -(-count // max(16, logits // vocabulary))
    return max(1, -(-count // max(1, tiles)))


@dataclass(frozen=True)
class _How:
    dtype: torch.dtype
    kernels: Kernels | None


def _finished(logits: Tensor, head: Head) -> Tensor:
    """Scaled and capped in place, as the architecture wants it; float32."""
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _in_place(head: Head) -> bool:
    """Logits become their gradient where they lie, by the kernels that know no scale and no cap."""
    return head.scale == 1.0 and head.softcap is None


def _tile_gradient(low_RV: Tensor, labels_R1: Tensor, head: Head, kernels: Kernels | None) -> tuple[Tensor, Tensor]:
    """Summed loss of a tile of raw logits and their gradient, in the type of `low_RV` and perhaps in its place."""
    if kernels is not None and _in_place(head):
        losses = torch.empty(low_RV.shape[0], dtype=torch.float32)
        kernels("cross_entropy", (low_RV.dtype,), low_RV, labels_R1.contiguous(), losses, *low_RV.shape)
        return losses.sum(), low_RV
    logits = _finished(low_RV.float(), head)
    capped = logits.clone() if head.softcap is not None else None
    normalizer = torch.logsumexp(logits, -1, keepdim=True)
    loss = (normalizer - logits.gather(1, labels_R1)).sum()
    grad = logits.sub_(normalizer).exp_()  # the softmax, in place
    grad.scatter_add_(1, labels_R1, torch.full_like(labels_R1, -1, dtype=grad.dtype))
    if capped is not None and head.softcap is not None:
        grad.mul_(1 - (capped / head.softcap).square_())
    if head.scale != 1.0:
        grad.mul_(head.scale)
    return loss, grad.to(low_RV.dtype)


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too; backward multiplies them with the incoming scalar."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, labels_N: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, how: _How) -> Tensor:
        dtype = how.dtype
        matrix = weight_VD.to(dtype)
        bias = None if bias_V is None else bias_V.float()
        inputs = hidden_ND.to(dtype)
        trains_weight, trains_bias = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        grad_hidden = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if trains_weight else None
        grad_bias = torch.zeros(matrix.shape[0], dtype=torch.float32, device=weight_VD.device) if trains_bias else None
        total = torch.zeros((), dtype=torch.float32, device=inputs.device)
        stack, kernels = Stack([matrix]), how.kernels if multiplies(how.kernels, [matrix]) else None
        compiled = how.kernels is not None and _in_place(head) and dtype == torch.bfloat16
        rows = _tile_rows(inputs.shape[0], matrix.shape[0], _COMPILED_TILE_LOGITS if compiled else _TILE_LOGITS)
        for start in range(0, inputs.shape[0], rows):
            tile, labels = inputs[start : start + rows], labels_N[start : start + rows, None]
            loss, low = _tile_gradient(product(tile, stack, turned=True, kernels=kernels, bias=bias), labels, head, how.kernels)
            total += loss
            if grad_bias is not None:
                grad_bias += low.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = product(low, stack, turned=False, kernels=kernels)
            if grad_weight is not None:
                outer_product(low, tile, kernels=kernels, out=grad_weight)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss head's gradients are used up: backward came a second time")
        factor = gradients[0]  # stays float32: rounded to the type of the gradients it would lengthen or shorten all of them alike
        scaled = [None if grad is None else grad.mul_(factor).to(dtype) for grad, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)]
        ctx.gradients = None
        return scaled[0], None, scaled[1], scaled[2], None, None


def summed_cross_entropy(hidden_ND: Tensor, labels_N: Tensor, head: Head, *, dtype: torch.dtype, kernels: Kernels | None = None) -> Tensor:
    """Sum over targets of -log p(label), () float32, differentiable in hidden states and in a trained head.

    `dtype` is what the matrix products are computed in; sums are float32. `kernels` work on a processor.
    """
    result: Tensor = _SummedCrossEntropy.apply(hidden_ND, labels_N, head.weight_VD, head.bias_V, head, _How(dtype, kernels))  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def head_stats(hidden_ND: Tensor, labels_N: Tensor, head: Head, *, dtype: torch.dtype) -> HeadStats:
    """Summed loss and number of targets ranked first, without gradients."""
    matrix = head.weight_VD.to(dtype)
    bias = None if head.bias_V is None else head.bias_V.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    rows = _tile_rows(hidden_ND.shape[0], matrix.shape[0], _TILE_LOGITS)
    for start in range(0, hidden_ND.shape[0], rows):
        labels = labels_N[start : start + rows]
        logits = _finished(F.linear(hidden_ND[start : start + rows].to(dtype), matrix, bias).float(), head)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(-1) == labels).sum()
    return HeadStats(loss, correct)
