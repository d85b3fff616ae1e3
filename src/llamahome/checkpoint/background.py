"""Copies and a thread for checkpoints that are written while training goes on.

The copies are kept in memory that is reused by the next save, because the first access to new memory costs several times as much as the
copy. From an accelerator they go through pinned memory on a stream of their own; the next update waits for them on the device.
Cost: the copy (measured: 59 MB in 4 to 12 ms, docs/log.md) and the memory of the trained weights and of the optimizer's state.
"""

import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

_NICENESS = 10
"""Of 19. If a thread of this niceness and a thread of the step want the same CPU, this one gets about a tenth of it."""


class Snapshot:
    """Copies of tensors on the CPU. Each `take` overwrites the copies of the one before."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._stream: torch.Stream | None = None
        self._copied: torch.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy `tensors` as they are now. Copies from an accelerator are complete after `wait`."""
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
        copies = {name: self._copies[name] for name in tensors}
        device = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), None)
        if device is not None:
            self._copy_on_stream(copies, tensors, device)
        elif copies:
            with torch.no_grad():
                torch._foreach_copy_(list(copies.values()), list(tensors.values()))
        return copies

    def _copy_on_stream(self, copies: Mapping[str, Tensor], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        if self._stream is None:
            self._stream = torch.Stream(device)
        self._stream.wait_stream(torch.accelerator.current_stream(device))
        with torch.no_grad(), self._stream:
            for name, copy in copies.items():
                copy.copy_(tensors[name], non_blocking=True)
        self._copied = self._stream.record_event()

    def wait(self) -> None:
        """Wait until the copies are complete. Called by the thread that writes them."""
        if self._copied is not None:
            self._copied.synchronize()

    def hold_back(self) -> None:
        """Let all later work on the device, such as an update, wait for the copies. The host does not wait."""
        if self._copied is not None and self._stream is not None:
            torch.accelerator.current_stream(self._stream.device).wait_event(self._copied)


def writer_thread() -> ThreadPoolExecutor:
    """A pool of one thread; on Linux the thread has a low priority."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="llamahome-checkpoint", initializer=_lower_priority)


def _lower_priority() -> None:
    if sys.platform == "linux":  # on other systems the niceness belongs to the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
