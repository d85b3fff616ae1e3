"""Losses of single targets other than cross entropy: distillation from a teacher's likeliest tokens, and the policy gradient of GRPO.

They run in the tiles of the loss head, so no [targets, vocabulary] array exists: a tile of logits becomes a summed loss and its gradient.
Memory: a tile of float32 logits and their gradient. Tests compare value and gradients with autograd over whole logits.

Legend: N target positions, R rows of a tile, V vocabulary, K likeliest tokens of the teacher.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llamahome.model.backends.loss import (
    TILE_LOGITS,
    Head,
    MakeTiles,
    PlainTiles,
    cap_gradient_,
    summed_cross_entropy,
    tile_rows,
    transform_logits_,
)

_TINY = 1e-30
"""Stands for a probability of zero, which has no logarithm."""


class TokenLoss(Protocol):
    """A loss that is a sum over targets."""

    def __call__(self, logits_RV: Tensor, rows_R: Tensor, /) -> tuple[Tensor, Tensor]:
        """() float32 and its gradient [R, V], for the final float32 logits of the targets numbered `rows_R`; may overwrite the logits."""


def summed_token_loss(
    hidden_ND: Tensor, head: Head, loss: TokenLoss, *, dtype: torch.dtype, tiles: MakeTiles = PlainTiles, logits: int = TILE_LOGITS
) -> Tensor:
    """Sum of `loss` over all targets, () float32, differentiable in hidden states and in a trained head.

    Products are those of `tiles`, in `dtype`; a tile holds at most `logits` logits.
    """
    numbers_N = torch.arange(hidden_ND.shape[0], device=hidden_ND.device)

    def make(matrix_VD: Tensor, made_for: Head) -> PlainTiles:
        return _TokenTiles(tiles(matrix_VD, made_for), loss, logits)

    return summed_cross_entropy(hidden_ND, numbers_N, head, dtype=dtype, tiles=make)


class _TokenTiles(PlainTiles):
    """The products of other tiles, and a loss of tokens; the labels are numbers of targets."""

    def __init__(self, products: PlainTiles, loss: TokenLoss, logits: int) -> None:
        super().__init__(products.matrix_VD, products.head)
        self._products, self._loss, self._most = products, loss, logits

    def rows(self, count: int) -> int:
        """Rows per tile."""
        return tile_rows(count, self.matrix_VD.shape[0], self._most)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], neither scaled nor capped."""
        return self._products.logits(hidden_RD)

    def hidden_gradient(self, grad_RV: Tensor) -> Tensor:
        """[R, D]."""
        return self._products.hidden_gradient(grad_RV)

    def add_weight_gradient(self, grad_RV: Tensor, hidden_RD: Tensor, total_VD: Tensor) -> None:
        """Add the gradient of a tile to `total_VD`."""
        self._products.add_weight_gradient(grad_RV, hidden_RD, total_VD)

    def loss(self, low_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of a tile of raw logits and their gradient."""
        logits = transform_logits_(low_RV.float(), self.head)
        capped = logits.clone() if self.head.softcap is not None else None
        loss, grad = self._loss(logits, labels_R1.squeeze(1))
        return loss, cap_gradient_(grad, capped, self.head).to(low_RV.dtype)


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of a teacher at every target, with their natural log-probabilities, and that of all other tokens together."""

    ids_NK: Tensor
    logs_NK: Tensor
    rest_N: Tensor


@dataclass(frozen=True)
class Distillation:
    """(1 - weight) * cross entropy with the label + weight * temperature^2 * KL(teacher || student).

    Both distributions have K + 1 outcomes: the teacher's K likeliest tokens, and all others as one. So the student is told how much is
    left for the others, and not how it divides. With a temperature, both are raised to 1 / temperature and normalized again; the factor
    temperature^2 keeps the gradient's size (Hinton, Vinyals and Dean, arXiv 1503.02531).
    """

    labels_N: Tensor
    teacher: TopTokens
    weight: float
    temperature: float
    sums_2: Tensor | None = None
    """The sums of the cross entropy and of the divergence over all targets are added to it."""

    def __call__(self, logits_RV: Tensor, rows_R: Tensor, /) -> tuple[Tensor, Tensor]:
        """The loss of a tile and its gradient, which overwrites the logits."""
        weight, temperature, ids_RK = self.weight, self.temperature, self.teacher.ids_NK[rows_R]
        labels_R1 = self.labels_N[rows_R, None]
        logits_RV.sub_(logits_RV.amax(-1, keepdim=True))
        label_R1, inside_RK = logits_RV.gather(1, labels_R1), logits_RV.gather(1, ids_RK)
        shares = logits_RV.exp_()
        total = shares.sum(-1, keepdim=True)
        log_total = total.log()
        own_RK = shares.div_(total).gather(1, ids_RK)
        shares.scatter_(1, ids_RK, 0.0)  # the rest is summed, because 1 - sum would lose a small rest to rounding
        rest_R1 = shares.sum(-1, keepdim=True).clamp_min_(_TINY)

        student = torch.log_softmax(torch.cat([inside_RK - log_total, rest_R1.log()], -1) / temperature, -1)
        taught = torch.softmax(torch.cat([self.teacher.logs_NK[rows_R], self.teacher.rest_N[rows_R, None]], -1) / temperature, -1)
        divergence = (torch.special.xlogy(taught, taught) - taught * student).sum() * temperature**2
        cross_entropy = (log_total - label_R1).sum()
        loss = weight * divergence + (1 - weight) * cross_entropy
        if self.sums_2 is not None:
            self.sums_2.add_(torch.stack([cross_entropy, divergence]))

        slope = (student.exp() - taught) * (temperature * weight)  # by the log-probability of each outcome; they add up to 0
        grad = shares.mul_(slope[:, -1:] / rest_R1 + (1 - weight))
        grad.scatter_(1, ids_RK, slope[:, :-1] + (1 - weight) * own_RK)
        grad.scatter_add_(1, labels_R1, torch.full_like(labels_R1, weight - 1, dtype=grad.dtype))
        return loss, grad


@dataclass(frozen=True)
class PolicyGradient:
    """-advantage * ratio + beta * KL(policy || reference) of every token of an answer, the loss of GRPO (arXiv 2402.03300).

    The ratio is that of the policy to itself, which is 1 and whose gradient is that of the log-probability, because every answer is used
    for one update; so there is nothing to clip. The divergence is estimated without bias by exp(d) - d - 1 with
    d = log reference - log policy (Schulman, "Approximating KL divergence", k3). `temperature` is that of the answers' sampling.
    """

    labels_N: Tensor
    advantages_N: Tensor
    temperature: float = 1.0
    reference_N: Tensor | None = None
    """Log-probabilities of the reference; None without beta."""
    beta: float = 0.0
    sums_2: Tensor | None = None
    """The sums of the divergence and of -log p over all tokens are added to it."""

    def __call__(self, logits_RV: Tensor, rows_R: Tensor, /) -> tuple[Tensor, Tensor]:
        """The loss of a tile and its gradient, which overwrites the logits."""
        labels_R1, advantages_R = self.labels_N[rows_R, None], self.advantages_N[rows_R]
        own_R, shares = _log_probabilities_(logits_RV, labels_R1, self.temperature)
        slope_R, loss, divergence = -advantages_R, -advantages_R.sum(), torch.zeros_like(own_R)
        if self.reference_N is not None:
            away_R = self.reference_N[rows_R] - own_R
            divergence = away_R.exp() - away_R - 1
            loss = loss + self.beta * divergence.sum()
            slope_R = slope_R + self.beta * (1 - away_R.exp())
        if self.sums_2 is not None:
            self.sums_2.add_(torch.stack([divergence.sum(), -own_R.sum()]))
        slope_R1 = slope_R[:, None] / self.temperature
        grad = shares.mul_(-slope_R1)
        grad.scatter_add_(1, labels_R1, slope_R1)
        return loss, grad


def _log_probabilities_(logits_RV: Tensor, labels_R1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The log-probability of each label [R], and all probabilities, which overwrite the logits."""
    logits_RV.div_(temperature)
    logits_RV.sub_(logits_RV.amax(-1, keepdim=True))
    label_R1 = logits_RV.gather(1, labels_R1)
    shares = logits_RV.exp_()
    total = shares.sum(-1, keepdim=True)
    return (label_R1 - total.log()).squeeze(1), shares.div_(total)


def _logits_in_tiles(hidden_ND: Tensor, head: Head, *, dtype: torch.dtype, logits: int) -> Iterator[tuple[slice, Tensor]]:
    """Final float32 logits, tile by tile."""
    matrix = head.weight_VD.to(dtype)
    bias = None if head.bias_V is None else head.bias_V.to(dtype)
    rows = tile_rows(hidden_ND.shape[0], matrix.shape[0], logits)
    for start in range(0, hidden_ND.shape[0], rows):
        tile = torch.nn.functional.linear(hidden_ND[start : start + rows].to(dtype), matrix, bias)
        yield slice(start, start + rows), transform_logits_(tile.float(), head)


@torch.no_grad()
def label_log_probabilities(
    hidden_ND: Tensor, labels_N: Tensor, head: Head, *, dtype: torch.dtype, temperature: float = 1.0, logits: int = TILE_LOGITS
) -> Tensor:
    """log p(label) of every target, float32 [N], without gradients."""
    found = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    for rows, tile_RV in _logits_in_tiles(hidden_ND, head, dtype=dtype, logits=logits):
        found[rows] = _log_probabilities_(tile_RV, labels_N[rows, None], temperature)[0]
    return found


@torch.no_grad()
def top_tokens(
    hidden_ND: Tensor, head: Head, count: int, *, dtype: torch.dtype, known: int | None = None, logits: int = TILE_LOGITS
) -> TopTokens:
    """The `count` likeliest tokens at every target (all, if the vocabulary has fewer), the likeliest first.

    Only the first `known` tokens exist, if it is given: rows behind them pad the head.
    """
    known = min(known or head.weight_VD.shape[0], head.weight_VD.shape[0])
    count = min(count, known)
    size, device = hidden_ND.shape[0], hidden_ND.device
    ids = torch.empty(size, count, dtype=torch.int64, device=device)
    logs, rest = torch.empty(size, count, device=device), torch.empty(size, device=device)
    for rows, tile_RV in _logits_in_tiles(hidden_ND, head, dtype=dtype, logits=logits):
        log_RV = torch.log_softmax(tile_RV[:, :known], -1)
        logs[rows], ids[rows] = torch.topk(log_RV, count, dim=-1)
        rest[rows] = torch.logsumexp(log_RV.scatter_(1, ids[rows], -torch.inf), -1)
    return TopTokens(ids, logs, rest)
