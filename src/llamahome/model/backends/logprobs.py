"""The log-probability of each target, from the hidden states, without ever holding [tokens, vocabulary] logits.

For losses that are not sums over targets, such as those of pairs of answers: what a target weighs in the gradient is known only when the
log-probabilities of all targets are. With a frozen head the forward pass keeps the unweighted gradient of each hidden state, and the
backward pass scales it: the cost is that of the summed loss (loss.py). With a trained head the backward pass computes the logits again.

Legend: N target positions, R rows of a tile, V vocabulary, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamahome.model.backends.loss import Head, MakeTiles, PlainTiles


@dataclass(frozen=True)
class _Options:
    dtype: torch.dtype
    tiles: MakeTiles


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, labels_N: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, options: _Options
    ) -> Tensor:
        inputs = hidden_ND.to(options.dtype)
        tiles = options.tiles(weight_VD.to(options.dtype), head)
        trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grad_hidden = torch.empty_like(inputs) if ctx.needs_input_grad[0] and not trained else None
        found = torch.empty(len(labels_N), dtype=torch.float32, device=inputs.device)
        for start, rows in tiles.spans(len(labels_N)):
            losses, grad = tiles.losses(tiles.logits(inputs[start : start + rows]), labels_N[start : start + rows, None])
            found[start : start + rows] = -losses
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = tiles.hidden_gradient(grad)
            del grad  # or two tiles of logits would be in memory
        ctx.save_for_backward(hidden_ND if trained else None, labels_N, weight_VD if trained else None, bias_V if trained else None)
        ctx.grad_hidden, ctx.dtype, ctx.head, ctx.options = grad_hidden, hidden_ND.dtype, head, options
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, labels_N, weight_VD, bias_V = ctx.saved_tensors
        weights_N1 = -gradients[0][:, None]  # of the losses
        if weight_VD is None:
            grad = None if ctx.grad_hidden is None else (ctx.grad_hidden * weights_N1).to(ctx.dtype)
            return grad, None, None, None, None, None
        needs = ctx.needs_input_grad
        inputs = hidden_ND.to(ctx.options.dtype)
        tiles = ctx.options.tiles(weight_VD.to(ctx.options.dtype), ctx.head)
        grad_hidden = torch.empty_like(inputs) if needs[0] else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=inputs.device) if needs[2] else None
        grad_bias = None if bias_V is None or not needs[3] else torch.zeros(bias_V.shape, dtype=torch.float32, device=inputs.device)
        for start, rows in tiles.spans(len(labels_N)):
            tile, weights = inputs[start : start + rows], weights_N1[start : start + rows]
            _, grad = tiles.losses(tiles.logits(tile), labels_N[start : start + rows, None])
            if grad_bias is not None:
                grad_bias += (grad * weights).sum(0)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = tiles.hidden_gradient(grad) * weights
            if grad_weight is not None:
                tiles.add_weight_gradient(grad, (tile * weights).to(tile.dtype), grad_weight)
            del grad
        found = ((grad_hidden, ctx.dtype), (grad_weight, weight_VD.dtype), (grad_bias, None if bias_V is None else bias_V.dtype))
        hidden, weight, bias = (None if grad is None else grad.to(dtype) for grad, dtype in found)
        return hidden, None, weight, bias, None, None


def target_logprobs(hidden_ND: Tensor, labels_N: Tensor, head: Head, *, dtype: torch.dtype, tiles: MakeTiles = PlainTiles) -> Tensor:
    """log p(label) of each target, [N] float32, differentiable in hidden states and in a trained head.

    Matrix products are computed in `dtype`, everything else in float32. Memory: one tile of logits and gradients of the size of the inputs.
    """
    options = _Options(dtype, tiles)
    result: Tensor = _TargetLogProbs.apply(hidden_ND, labels_N, head.weight_VD, head.bias_V, head, options)  # type: ignore[no-untyped-call]
    return result
