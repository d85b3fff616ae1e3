"""The tiles of the loss head by compiled kernels, which replace logits by their gradient in place."""

import torch
from torch import Tensor

from llamahome.model.backends.cpu.autotune import ProductDispatch, Speedups
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.products import Stack, can_multiply, outer_product, product
from llamahome.model.backends.loss import TILE_LOGITS, Head, PlainTiles, tile_rows

_BF16_TILE_LOGITS = 4 * TILE_LOGITS
"""50 MB in bfloat16. Reading and packing the head's weights for fewer, larger tiles saves more time than a tile that fits the cache."""


class CompiledTiles(PlainTiles):
    """Computes tiles by kernels; the loss of a head that scales or caps its logits is computed in plain torch."""

    def __init__(self, matrix_VD: Tensor, head: Head, kernels: Kernels, speedups: Speedups | None = None) -> None:
        """`speedups` decide between the kernels and torch for each product; without them the kernels are used if they can be."""
        super().__init__(matrix_VD, head)
        self._kernels, self._stack = kernels, Stack([matrix_VD])
        self._dispatch = ProductDispatch.of(kernels if can_multiply(kernels, [matrix_VD]) else None, speedups)
        self._in_place = head.scale == 1.0 and head.softcap is None

    def rows(self, count: int) -> int:
        """Rows per tile for `count` rows in total."""
        low = self._in_place and self.matrix_VD.dtype == torch.bfloat16
        return tile_rows(count, self.matrix_VD.shape[0], _BF16_TILE_LOGITS if low else TILE_LOGITS)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], neither scaled nor capped, in the dtype of the products."""
        return product(hidden_RD, self._stack, transposed=True, kernels=self._dispatch.forward, bias=self.bias_V)

    def losses(self, low_RV: Tensor, labels_R1: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row of a tile of raw logits and the gradient of their sum."""
        if not self._in_place:
            return super().losses(low_RV, labels_R1)
        losses = torch.empty(low_RV.shape[0], dtype=torch.float32)
        self._kernels("cross_entropy", (low_RV.dtype,), low_RV, labels_R1.contiguous(), losses, *low_RV.shape)
        return losses, low_RV

    def hidden_gradient(self, grad_RV: Tensor) -> Tensor:
        """[R, D]."""
        return product(grad_RV, self._stack, transposed=False, kernels=self._dispatch.inputs)

    def add_weight_gradient(self, grad_RV: Tensor, hidden_RD: Tensor, total_VD: Tensor) -> None:
        """Add the gradient of a tile to `total_VD`, float32."""
        outer_product(grad_RV, hidden_RD, kernels=self._dispatch.weights, out=total_VD)
