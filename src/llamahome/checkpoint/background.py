"""What lets a checkpoint be written while training goes on: a copy of what changes, and a thread that gives way to the step.

The copy lies in memory that is kept from one save to the next, for memory that is touched for the first time costs several times as much as
the copying. From an accelerator it goes through pinned memory beside the steps that follow; the next update waits for it, on the device.
Cost: the copy (measured: 59 MB in 4 to 12 ms, docs/log.md), and its memory: trained weights and the moments of the optimizer.
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
        self._stream: torch.Stream | None = None
        self._copied: torch.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors` as they are now; from an accelerator they are there after `wait`."""
        for name, tensor in tensors.items():
            kept = self._kept.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
        taken = {name: self._kept[name] for name in tensors}
        away = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), None)
        if away is not None:
            self._copy_beside(taken, tensors, away)
        elif taken:
            with torch.no_grad():
                torch._foreach_copy_(list(taken.values()), list(tensors.values()))
        return taken

    def _copy_beside(self, taken: Mapping[str, Tensor], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        if self._stream is None:
            self._stream = torch.Stream(device)
        self._stream.wait_stream(torch.accelerator.current_stream(device))
        with torch.no_grad(), self._stream:
            for name, kept in taken.items():
                kept.copy_(tensors[name], non_blocking=True)
        self._copied = self._stream.record_event()

    def wait(self) -> None:
        """Wait until the copies are there; for the thread that writes them."""
        if self._copied is not None:
            self._copied.synchronize()

    def hold_back(self) -> None:
        """Let what is queued on the device from now on, an update, wait for the copies; the host does not wait."""
        if self._copied is not None and self._stream is not None:
            torch.accelerator.current_stream(self._stream.device).wait_event(self._copied)


def writer_thread() -> ThreadPoolExecutor:
    """Does one piece of work after the other beside its caller; on Linux with a small share of the processors."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="llamahome-checkpoint", initializer=_give_way)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere niceness belongs to the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _GIVES_WAY)
