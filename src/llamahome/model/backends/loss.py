"""The loss head: from hidden states of target positions to a summed cross entropy, never holding [tokens, vocabulary] at once.

Logits are computed in tiles of rows; the gradient with respect to hidden states (and to the head's weights, when they are trained) is
computed in the same pass, so the backward pass only scales it. Memory: one tile of logits (25 to 50 MB) and one gradient the size
of the inputs. The result is a *sum* in float32: dividing by the global number of targets is the step's business.

Legend: N target positions, R rows of a tile, V vocabulary, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_LOGITS = 128 * 49_152
"""Of a tile; as float32 25 MB, within a large cache."""


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


def tile_rows(count: int, vocabulary: int, logits: int) -> int:
    """Rows of tiles as equal as can be, of at most so many `logits`."""
    tiles = -(-count // max(16, logits // vocabulary))
    return max(1, -(-count // max(1, tiles)))


def finished(logits: Tensor, head: Head) -> Tensor:
    """Scaled and capped in place, as the architecture wants it; float32."""
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


class PlainTiles:
    """The work on one tile after the other in plain torch; `matrix` is the head's weight in the type of the products."""

    def __init__(self, matrix_VD: Tensor, head: Head) -> None:
        self.matrix_VD, self.head = matrix_VD, head
        self.bias_V = None if head.bias_V is None else head.bias_V.float()

    def rows(self, count: int) -> int:
        """Of a tile, when there are `count` in all."""
        return tile_rows(count, self.matrix_VD.shape[0], TILE_LOGITS)

    def cuts(self, count: int) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each tile, in order, when there are `count` rows in all."""
        rows = self.rows(count)
        return ((start, min(rows, count - start)) for start in range(0, count, rows))

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], raw, in the type of the products."""
        return F.linear(hidden_RD, self.matrix_VD, None if self.bias_V is None else self.bias_V.to(hidden_RD.dtype))

    def loss(self, low_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of a tile of raw logits and their gradient, in the type of `low_RV` and perhaps in its place."""
        head, logits = self.head, finished(low_RV.float(), self.head)
        capped = logits.clone() if head.softcap is not None else None
        top = logits.amax(-1, keepdim=True)
        wanted = logits.gather(1, labels_R1) - top
        grad = logits.sub_(top).exp_()  # the softmax, in place; exp(logits - log of the sum) would round a whole row to one side
        total = grad.sum(-1, keepdim=True)
        loss = (total.log() - wanted).sum()
        grad.div_(total)
        grad.scatter_add_(1, labels_R1, torch.full_like(labels_R1, -1, dtype=grad.dtype))
        if capped is not None and head.softcap is not None:
            grad.mul_(1 - (capped / head.softcap).square_())
        if head.scale != 1.0:
            grad.mul_(head.scale)
        return loss, grad.to(low_RV.dtype)

    def hidden_gradient(self, grad_RV: Tensor) -> Tensor:
        """[R, D]."""
        return grad_RV @ self.matrix_VD

    def add_weight_gradient(self, grad_RV: Tensor, hidden_RD: Tensor, total_VD: Tensor) -> None:
        """Add the tile's share to `total`, float32."""
        total_VD += grad_RV.t() @ hidden_RD


class MakeTiles(Protocol):
    """How a back end works on tiles."""

    def __call__(self, matrix_VD: Tensor, head: Head, /) -> PlainTiles: ...  # noqa: D102


@dataclass(frozen=True)
class _How:
    dtype: torch.dtype
    tiles: MakeTiles


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too; backward multiplies them with the incoming scalar."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, labels_N: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, how: _How) -> Tensor:
        dtype = how.dtype
        matrix = weight_VD.to(dtype)
        inputs = hidden_ND.to(dtype)
        trains_weight, trains_bias = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        grad_hidden = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if trains_weight else None
        grad_bias = torch.zeros(matrix.shape[0], dtype=torch.float32, device=weight_VD.device) if trains_bias else None
        total = torch.zeros((), dtype=torch.float32, device=inputs.device)
        tiles = how.tiles(matrix, head)
        for start, rows in tiles.cuts(inputs.shape[0]):
            tile, labels = inputs[start : start + rows], labels_N[start : start + rows, None]
            loss, low = tiles.loss(tiles.logits(tile), labels)
            total += loss
            if grad_bias is not None:
                grad_bias += low.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = tiles.hidden_gradient(low)
            if grad_weight is not None:
                tiles.add_weight_gradient(low, tile, grad_weight)
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


def summed_cross_entropy(hidden_ND: Tensor, labels_N: Tensor, head: Head, *, dtype: torch.dtype, tiles: MakeTiles = PlainTiles) -> Tensor:
    """Sum over targets of -log p(label), () float32, differentiable in hidden states and in a trained head.

    `dtype` is what the matrix products are computed in; sums are float32.
    """
    result: Tensor = _SummedCrossEntropy.apply(hidden_ND, labels_N, head.weight_VD, head.bias_V, head, _How(dtype, tiles))  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def head_stats(hidden_ND: Tensor, labels_N: Tensor, head: Head, *, dtype: torch.dtype, logits: int = TILE_LOGITS) -> HeadStats:
    """Summed loss and number of targets ranked first, without gradients, in tiles of `logits`."""
    matrix = head.weight_VD.to(dtype)
    bias = None if head.bias_V is None else head.bias_V.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    rows = tile_rows(hidden_ND.shape[0], matrix.shape[0], logits)
    for start in range(0, hidden_ND.shape[0], rows):
        labels = labels_N[start : start + rows]
        tile = finished(F.linear(hidden_ND[start : start + rows].to(dtype), matrix, bias).float(), head)
        loss += F.cross_entropy(tile, labels, reduction="sum")
        correct += (tile.argmax(-1) == labels).sum()
    return HeadStats(loss, correct)
