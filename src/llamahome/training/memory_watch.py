"""Notices on a processor that memory is about to run out, where the system would kill the process instead of refusing memory.

The free memory of the machine or of the tightest control group is read before every layer of a pass, at most every 20 ms. If less is free
than a twentieth of all (256 MiB at most) and what the largest layer so far has taken, the pass ends as if memory was refused.
All ranks then do the step again in smaller micro-batches. A pass of a single example always runs, because it cannot be made smaller.
Cost: 0.4 ms per read on a busy processor (measured), so at most 2 % of the time.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from llamahome.data.records import Microbatch
from llamahome.units import show_bytes

_RESERVED_SHARE = 0.05
_MOST_RESERVED = 2**28
_READ_EVERY_S = 0.02


class MemoryWatch:
    """Raises MemoryError in a pass of several examples when too little memory is free."""

    def __init__(self, free: Callable[[], int], *, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`free` reads the bytes that this process can still allocate, of `limit` in all."""
        self._free, self._clock = free, clock
        self._reserved = int(min(_MOST_RESERVED, _RESERVED_SHARE * limit))
        self._watching, self._read_at = False, -1.0
        self._last, self._growth = 0, 0

    def around(self, loss_sum: Callable[[Microbatch], Tensor], layers: Iterable[nn.Module]) -> Callable[[Microbatch], Tensor]:
        """`loss_sum`, whose passes through `layers` are watched."""
        for layer in layers:
            layer.register_forward_pre_hook(self._before_layer)

        def watched(batch: Microbatch) -> Tensor:
            self._watching = len(batch.row_lengths) > 1
            self._last, self._growth, self._read_at = self._free(), 0, -1.0
            try:
                return loss_sum(batch)
            finally:
                self._watching = False

        return watched

    def _before_layer(self, *_: Any) -> None:
        if not self._watching or self._clock() - self._read_at < _READ_EVERY_S:
            return
        free, self._read_at = self._free(), self._clock()
        self._growth, self._last = max(self._growth, self._last - free), free
        if free < self._reserved + self._growth:
            raise MemoryError(f"{show_bytes(free)} of memory are free, and the system ends processes when it has none")
