"""Copies and a thread for checkpoints that are written while training goes on.

The loop only names the tensors. A thread copies them piece by piece while the next passes run, because weights and moments do not change
before the next update; the update first copies what is left. That thread has the priority of the loop, which waits for it; the one that
writes has a low priority. From an accelerator the copies go through pinned memory on a stream of their own, and the next update waits for
them on the device. The copies are kept in memory that is reused by the next save, because the first access to new memory costs several
times as much as the copy.
Cost: the memory of the trained weights and of the optimizer's state; what the loop waits is measured by benchmarks/checkpoint_speed.py.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from llamahome.checkpoint.store import SaveFailed
from llamahome.errors import Problem

_NICENESS = 10
"""Of 19. If a thread of this niceness and a thread of the step want the same CPU, this one gets about a tenth of it."""
_CLONE_FS = 0x200
"""The flag of unshare(2) for a working folder of its own."""
_GRAIN = 1 << 15
"""Values that torch copies with one thread (at::internal::GRAIN_SIZE). A copy with several would take all processors from a
pass."""
_GROUP = 1 << 18
"""Values that are copied at a time: 1 MiB of float32. The update waits for at most so much that the other thread has begun."""


class Snapshot:
    """Copies of tensors on the CPU. Each `begin` overwrites the copies of the one before."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._groups: Iterator[tuple[list[Tensor], list[Tensor]]] = iter(())
        self._changed = threading.Condition()
        self._busy, self._left = 0, 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stream: torch.Stream | None = None
        self._copied: torch.Event | None = None

    def begin(self, tensors: Mapping[str, Tensor], *, passes_change: Set[str] = frozenset()) -> None:
        """The copies will have the values that `tensors` have now, if `hold_back` is called before the next update.

        `passes_change` names tensors that also a forward pass may change: they are copied at once. The copies of the save before must not
        be in use any more. Raises SaveFailed if there is no memory for the copies.
        """
        with _memory_errors():
            for name, tensor in tensors.items():
                copy = self._copies.get(name)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
            self._names, self._copied, self._error = list(tensors), None, None
            for name in passes_change & tensors.keys():
                self._copies[name].copy_(tensors[name], non_blocking=True)
            later = {name: tensor for name, tensor in tensors.items() if name not in passes_change}
            device = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), None)
            if device is not None:
                self._copy_on_stream(later, device)
                return
            with self._changed:
                self._left = sum(tensor.numel() for tensor in later.values())
                self._groups = _groups([(self._copies[name], tensor) for name, tensor in later.items()])
            self._thread = threading.Thread(target=self._copy, name="llamahome-copy", daemon=True)
            self._thread.start()

    def copies(self) -> dict[str, Tensor]:
        """The copies once they are complete. Called by the thread that writes them.

        Raises SaveFailed if a copy could not be made.
        """
        if self._copied is not None:
            self._copied.synchronize()
        if self._thread is not None:
            self._thread.join()
        self._copy()  # what is left if that thread has failed
        if self._left:
            raise _not_copied(self._error)
        return {name: self._copies[name] for name in self._names}

    def hold_back(self) -> None:
        """Complete the copies before an update; on an accelerator, let the update wait for them without waiting here.

        A copy that cannot be made is no error here: `copies` raises it, and training goes on.
        """
        if self._copied is not None and self._stream is not None:
            torch.accelerator.current_stream(self._stream.device).wait_event(self._copied)
        self._copy()

    def _copy(self) -> None:
        """Copy what nobody has begun, then wait for what the other thread has begun."""
        try:
            while (group := self._take()) is not None:
                done = 0
                try:
                    with torch.no_grad():
                        torch._foreach_copy_(*group)
                    done = sum(copy.numel() for copy in group[0])
                finally:
                    with self._changed:
                        self._busy, self._left = self._busy - 1, self._left - done
                        self._changed.notify_all()
        except (MemoryError, RuntimeError) as error:
            with self._changed:
                self._groups, self._error = iter(()), error
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def _take(self) -> tuple[list[Tensor], list[Tensor]] | None:
        with self._changed:
            group = next(self._groups, None)
            self._busy += group is not None
        return group

    def _copy_on_stream(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        if self._stream is None:
            self._stream = torch.Stream(device)
        self._stream.wait_stream(torch.accelerator.current_stream(device))
        with torch.no_grad(), self._stream:
            for name, tensor in tensors.items():
                self._copies[name].copy_(tensor, non_blocking=True)
        self._copied = self._stream.record_event()


def _groups(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Copies and their sources in pieces, about _GROUP values at a time."""
    copies: list[Tensor] = []
    sources: list[Tensor] = []
    values = 0
    for copy, tensor in pairs:
        if tensor.numel() > _GROUP and tensor.is_contiguous():
            for copy_part, part in zip(torch.split(copy.view(-1), _GROUP), torch.split(tensor.view(-1), _GROUP), strict=True):
                yield list(torch.split(copy_part, _GRAIN)), list(torch.split(part, _GRAIN))
            continue
        copies.append(copy)
        sources.append(tensor)
        values += tensor.numel()
        if values >= _GROUP:
            yield copies, sources
            copies, sources, values = [], [], 0
    if copies:
        yield copies, sources


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns the errors of an allocator into SaveFailed."""
    try:
        with torch.no_grad():
            yield
    except (MemoryError, RuntimeError) as error:
        raise _not_copied(error) from error


def _not_copied(error: BaseException | None) -> SaveFailed:
    cause = (str(error).splitlines() or ["no more memory"])[0] if error is not None else "a copy is not complete"
    message = f"weights and optimizer could not be copied for a save beside the training: {cause[:160]}; earlier ones are untouched"
    hint = "--set checkpoint.async=false"
    return SaveFailed(Problem(code="checkpoint.write-failed", message=message, where="checkpoint.async", hint=hint))


def writer_thread() -> ThreadPoolExecutor:
    """A pool of one thread; on Linux the thread has a low priority, and its working folder stays that of now."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llamahome-checkpoint", initializer=_apart_from_the_loop)
    pool.submit(int).result()  # it begins here, in the folder of now
    return pool


def _apart_from_the_loop() -> None:
    """The loop may call a reward of the user's that works in another folder, while this thread writes to relative paths."""
    if sys.platform == "linux":  # on other systems both belong to the whole process
        ctypes.CDLL(None).unshare(_CLONE_FS)  # a container may forbid it: the thread then has the folder of the process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
