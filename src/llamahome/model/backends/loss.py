"""The loss head: summed cross entropy from the hidden states of target positions, without ever holding [tokens, vocabulary] logits.

Logits are computed in tiles of rows. The forward pass also computes the gradients of the hidden states (and of the head's weights, if they
are trained), so the backward pass only scales them. Memory: one tile of logits (25 to 50 MB) and gradients of the size of the inputs. The
result is a *sum* in float32; the training step divides it by the global number of targets.

Legend: N target positions, R rows of a tile, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_LOGITS = 128 * 49_152
"""Logits of a tile: 25 MB in float32, which fit a large cache."""


@dataclass(frozen=True)
class Head:
    """The output layer, which computes logits from hidden states."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    """Logits are multiplied by it (Cohere, Granite)."""
    softcap: float | None = None
    """Then logits become softcap * tanh(logits / softcap) (Gemma 2)."""


@dataclass(frozen=True)
class HeadStats:
    """Sums over target positions, on the device."""

    loss_sum: Tensor
    """() float32, nats."""
    correct: Tensor
    """() int64, number of targets that the model ranks first."""


def tile_rows(count: int, vocabulary: int, logits: int) -> int:
    """Rows per tile, if `count` rows are cut into equal tiles of at most `logits` logits."""
    tiles = -(-count // max(16, logits // vocabulary))
    return max(1, -(-count // max(1, tiles)))


def transform_logits_(logits: Tensor, head: Head) -> Tensor:
    """Scale and cap float32 logits in place, as the head requires."""
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def cap_gradient_(grad: Tensor, capped: Tensor | None, head: Head) -> Tensor:
    """The gradient of raw logits, in place of that of the final ones; `capped` are the final ones of a head that caps them."""
    if capped is not None and head.softcap is not None:
        grad.mul_(1 - (capped / head.softcap).square_())
    if head.scale != 1.0:
        grad.mul_(head.scale)
    return grad


class PlainTiles:
    """Computes tiles in plain torch; `matrix_VD` is the head's weight in the dtype of the products."""

    def __init__(self, matrix_VD: Tensor, head: Head) -> None:
        self.matrix_VD, self.head = matrix_VD, head
        self.bias_V = None if head.bias_V is None else head.bias_V.float()

    def rows(self, count: int) -> int:
        """Rows per tile for `count` rows in total."""
        return tile_rows(count, self.matrix_VD.shape[0], TILE_LOGITS)

    def spans(self, count: int) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each tile, in order, for `count` rows in total."""
        rows = self.rows(count)
        return ((start, min(rows, count - start)) for start in range(0, count, rows))

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], neither scaled nor capped, in the dtype of the products."""
        return F.linear(hidden_RD, self.matrix_VD, None if self.bias_V is None else self.bias_V.to(hidden_RD.dtype))

    def loss(self, low_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of a tile of raw logits and their gradient, in the dtype of `low_RV`; the gradient may overwrite `low_RV`."""
        losses_R, grad_RV = self.losses(low_RV, labels_R1)
        return losses_R.sum(), grad_RV

    def losses(self, low_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row, [R] float32, and the gradient of their sum, as `loss` gives it."""
        head, logits = self.head, transform_logits_(low_RV.float(), self.head)
        capped = logits.clone() if head.softcap is not None else None
        top = logits.amax(-1, keepdim=True)
        target_logits = logits.gather(1, labels_R1) - top
        grad = logits.sub_(top).exp_()  # softmax in place; exp(logits - log of the sum) would round a whole row in one direction
        total = grad.sum(-1, keepdim=True)
        losses = (total.log() - target_logits).squeeze(1)
        grad.div_(total)
        grad.scatter_add_(1, labels_R1, torch.full_like(labels_R1, -1, dtype=grad.dtype))
        return losses, cap_gradient_(grad, capped, head).to(low_RV.dtype)

    def hidden_gradient(self, grad_RV: Tensor) -> Tensor:
        """[R, D]."""
        return grad_RV @ self.matrix_VD

    def add_weight_gradient(self, grad_RV: Tensor, hidden_RD: Tensor, total_VD: Tensor) -> None:
        """Add the gradient of a tile to `total_VD`, float32."""
        total_VD += grad_RV.t() @ hidden_RD


MakeTiles = Callable[[Tensor, Head], PlainTiles]
"""Creates a back end's implementation of the tiles from the head's weight, [V, D] in the dtype of the products, and the head."""


@dataclass(frozen=True)
class _Options:
    dtype: torch.dtype
    tiles: MakeTiles


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients as well; backward multiplies them by the incoming scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, labels_N: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, options: _Options
    ) -> Tensor:
        dtype, device = options.dtype, weight_VD.device
        matrix = weight_VD.to(dtype)
        inputs = hidden_ND.to(dtype)
        trains_weight, trains_bias = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        grad_hidden = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=device) if trains_weight else None
        grad_bias = torch.zeros(matrix.shape[0], dtype=torch.float32, device=device) if trains_bias else None
        total = torch.zeros((), dtype=torch.float32, device=inputs.device)
        tiles = options.tiles(matrix, head)
        for start, rows in tiles.spans(inputs.shape[0]):
            tile, labels = inputs[start : start + rows], labels_N[start : start + rows, None]
            loss, grad = tiles.loss(tiles.logits(tile), labels)
            total += loss
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = tiles.hidden_gradient(grad)
            if grad_weight is not None:
                tiles.add_weight_gradient(grad, tile, grad_weight)
            del grad  # or two tiles of logits would be in memory
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss head's gradients are used up: backward was called a second time")
        factor = gradients[0]  # stays float32: rounding it to a lower dtype would scale all gradients by the same error
        scaled = [None if grad is None else grad.mul_(factor).to(dtype) for grad, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)]
        ctx.gradients = None
        return scaled[0], None, scaled[1], scaled[2], None, None


def summed_cross_entropy(hidden_ND: Tensor, labels_N: Tensor, head: Head, *, dtype: torch.dtype, tiles: MakeTiles = PlainTiles) -> Tensor:
    """Sum over targets of -log p(label), () float32, differentiable in hidden states and in a trained head.

    Matrix products are computed in `dtype`; sums are float32.
    """
    options = _Options(dtype, tiles)
    result: Tensor = _SummedCrossEntropy.apply(hidden_ND, labels_N, head.weight_VD, head.bias_V, head, options)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def head_stats(hidden_ND: Tensor, labels_N: Tensor, head: Head, *, dtype: torch.dtype, logits: int = TILE_LOGITS) -> HeadStats:
    """Summed loss and number of targets ranked first, without gradients, in tiles of at most `logits` logits."""
    matrix = head.weight_VD.to(dtype)
    bias = None if head.bias_V is None else head.bias_V.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    rows = tile_rows(hidden_ND.shape[0], matrix.shape[0], logits)
    for start in range(0, hidden_ND.shape[0], rows):
        labels = labels_N[start : start + rows]
        tile = transform_logits_(F.linear(hidden_ND[start : start + rows].to(dtype), matrix, bias).float(), head)
        loss += F.cross_entropy(tile, labels, reduction="sum")
        correct += (tile.argmax(-1) == labels).sum()
        del tile
    return HeadStats(loss, correct)
