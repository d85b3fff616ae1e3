"""The tiles of the loss head by compiled passes: logits become their gradient where they lie."""

import torch
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.products import Stack, multiplies, outer_product, product
from llamahome.model.backends.cpu.race import Multipliers, Speeds
from llamahome.model.backends.loss import TILE_LOGITS, Head, PlainTiles, tile_rows

_LOW_TILE_LOGITS = 4 * TILE_LOGITS
"""bfloat16 all the way, 50 MB: more rows share the reading and packing of the head's weights, which takes longer than the cache saves."""


class CompiledTiles(PlainTiles):
    """The work on one tile after the other; a head that scales or caps its logits takes its losses from plain torch."""

    def __init__(self, matrix_VD: Tensor, head: Head, kernels: Kernels, speeds: Speeds | None = None) -> None:
        """`speeds` say who multiplies; without them our products do, where they can."""
        super().__init__(matrix_VD, head)
        self._kernels, self._stack = kernels, Stack([matrix_VD])
        self._by = Multipliers.of(kernels if multiplies(kernels, [matrix_VD]) else None, speeds)
        self._in_place = head.scale == 1.0 and head.softcap is None

    def rows(self, count: int) -> int:
        """Of a tile, when there are `count` in all."""
        low = self._in_place and self.matrix_VD.dtype == torch.bfloat16
        return tile_rows(count, self.matrix_VD.shape[0], _LOW_TILE_LOGITS if low else TILE_LOGITS)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], raw, in the type of the products."""
        return product(hidden_RD, self._stack, turned=True, kernels=self._by.forward, bias=self.bias_V)

    def loss(self, low_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of a tile of raw logits and their gradient."""
        if not self._in_place:
            return super().loss(low_RV, labels_R1)
        losses = torch.empty(low_RV.shape[0], dtype=torch.float32)
        self._kernels("cross_entropy", (low_RV.dtype,), low_RV, labels_R1.contiguous(), losses, *low_RV.shape)
        return losses.sum(), low_RV

    def hidden_gradient(self, grad_RV: Tensor) -> Tensor:
        """[R, D]."""
        return product(grad_RV, self._stack, turned=False, kernels=self._by.inputs)

    def add_weight_gradient(self, grad_RV: Tensor, hidden_RD: Tensor, total_VD: Tensor) -> None:
        """Add the tile's share to `total`, float32."""
        outer_product(grad_RV, hidden_RD, kernels=self._by.weights, out=total_VD)
