"""The tiles of the loss head on a GPU: few and large, the logits of each turned into their gradient by one compiled pass.

measured on an H100 at 128k words (docs/log.md): tiles of 2,048 rows, compiled, beat Liger's fused loss and torch's own choice.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llamahome.model.backends.cuda.layers import Compiled
from llamahome.model.backends.loss import Head, PlainTiles

TILE_ROWS = 2048
SMALLEST_TILE = 256
"""Rows are filled up to a multiple of it, so that compiled tiles come in four sizes."""


class PlainDeviceTiles(PlainTiles):
    """Large tiles in plain torch."""

    def rows(self, count: int) -> int:
        """Of a tile, when there are `count` in all."""
        return TILE_ROWS


class CompiledDeviceTiles(PlainDeviceTiles):
    """Large tiles by a compiled pass; the number of rows is a multiple of the smallest tile, and labels of rows that fill up are -1."""

    def __init__(self, matrix_VD: Tensor, head: Head, turn: Compiled) -> None:
        super().__init__(matrix_VD, head)
        self._turn = turn

    def cuts(self, count: int) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each tile: as many whole ones as there are, then ever smaller ones."""
        start, size = 0, TILE_ROWS
        while start < count:
            while size > max(SMALLEST_TILE, count - start):
                size //= 2
            yield start, size
            start += size

    def loss(self, low_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of a tile of raw logits; their gradient in their place."""
        loss: Tensor = self._turn(low_RV, labels_R1, self.head.scale, self.head.softcap)
        return loss, low_RV


def turn_into_gradient(low_RV: Tensor, labels_R1: Tensor, scale: float, softcap: float | None) -> Tensor:
    """() float32, summed loss of the rows whose label is not negative; their gradient is written over the raw logits."""
    logits = low_RV.float() * scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        logits, slope = capped * softcap, 1 - capped * capped
    learned, words = labels_R1 >= 0, torch.arange(logits.shape[1], device=logits.device)
    normalizer = torch.logsumexp(logits, -1, keepdim=True)
    loss = torch.where(learned, normalizer - logits.gather(1, labels_R1.clamp_min(0)), 0.0).sum()
    grad = (torch.exp(logits - normalizer) - (words == labels_R1).float()) * scale
    low_RV.copy_(torch.where(learned, grad if slope is None else grad * slope, 0.0))
    return loss


def filled_up(hidden_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Both with rows from which nothing is learned, up to whole tiles."""
    more = -len(labels_N) % SMALLEST_TILE
    return torch.nn.functional.pad(hidden_ND, (0, 0, 0, more)), torch.nn.functional.pad(labels_N, (0, more), value=-1)
