"""What lets a checkpoint be written while training goes on: a copy of what changes, and a thread that gives way to the step.

The copy lies in memory that is kept from one save to the next, for memory that is touched for the first time costs several times as much as
the copying. Cost: the copy (measured: 59 MB in 4 to 12 ms, docs/log.md), and its memory: trained weights and the moments of the optimizer.
"""

import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

_GIVES_WAY = 10
"""Of 19: a thread of this niceness gets a ninth of what one of the step gets where both want the same processor."""


class Snapshot:
    """Copies of tensors on the CPU. What `take` gave is overwritten by the next `take`."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors` as they are now."""
        for name, tensor in tensors.items():
            kept = self._kept.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        taken = {name: self._kept[name] for name in tensors}
        if taken:
            with torch.no_grad():
                torch._foreach_copy_(list(taken.values()), list(tensors.values()))
        return taken


def writer_thread() -> ThreadPoolExecutor:
    """Does one piece of work after the other beside its caller; on Linux with a small share of the processors."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="llamahome-checkpoint", initializer=_give_way)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere niceness belongs to the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _GIVES_WAY)
