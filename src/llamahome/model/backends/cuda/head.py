"""The tiles of the loss head on a GPU: few and large, with one compiled kernel that replaces logits by their gradient.

measured on an H100 with a vocabulary of 128k (docs/log.md): compiled tiles of 2,048 rows are faster than Liger's fused loss and than
torch's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llamahome.model.backends.cuda.layers import Compiled
from llamahome.model.backends.loss import Head, PlainTiles

TILE_ROWS = 2048
MIN_TILE_ROWS = 256
"""The number of rows is padded to a multiple of it, so that compiled tiles have four sizes."""


class PlainDeviceTiles(PlainTiles):
    """Large tiles in plain torch."""

    def rows(self, count: int) -> int:
        """Rows per tile."""
        return TILE_ROWS


class CompiledDeviceTiles(PlainDeviceTiles):
    """Large compiled tiles. The number of rows is a multiple of MIN_TILE_ROWS, and padding rows have the label -1."""

    def __init__(self, matrix_VD: Tensor, head: Head, loss_and_gradient: Compiled) -> None:
        super().__init__(matrix_VD, head)
        self._loss_and_gradient = loss_and_gradient

    def spans(self, count: int) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each tile: as many full tiles as possible, then tiles of half, a quarter and an eighth."""
        start, size = 0, TILE_ROWS
        while start < count:
            while size > max(MIN_TILE_ROWS, count - start):
                size //= 2
            yield start, size
            start += size

    def loss(self, low_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of a tile of raw logits and their gradient, which overwrites the logits."""
        loss: Tensor = self._loss_and_gradient(low_RV, labels_R1, self.head.scale, self.head.softcap)
        return loss, low_RV


def loss_and_gradient_(low_RV: Tensor, labels_R1: Tensor, scale: float, softcap: float | None) -> Tensor:
    """() float32, the summed loss of the rows whose label is not negative; overwrites the raw logits with their gradient."""
    logits = low_RV.float() * scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        logits, slope = capped * softcap, 1 - capped * capped
    is_target, vocabulary = labels_R1 >= 0, torch.arange(logits.shape[1], device=logits.device)
    normalizer = torch.logsumexp(logits, -1, keepdim=True)
    loss = torch.where(is_target, normalizer - logits.gather(1, labels_R1.clamp_min(0)), 0.0).sum()
    grad = (torch.exp(logits - normalizer) - (vocabulary == labels_R1).float()) * scale
    low_RV.copy_(torch.where(is_target, grad if slope is None else grad * slope, 0.0))
    return loss


def pad_targets(hidden_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Both arguments with padding rows up to a multiple of MIN_TILE_ROWS; their label is -1."""
    padding = -len(labels_N) % MIN_TILE_ROWS
    return torch.nn.functional.pad(hidden_ND, (0, 0, 0, padding)), torch.nn.functional.pad(labels_N, (0, padding), value=-1)
