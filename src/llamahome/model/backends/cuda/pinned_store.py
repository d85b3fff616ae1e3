"""Inputs of layers in pinned memory of the machine, copied beside the passes on a stream of their own.

A copy out starts when the pass so far is done, and the pass waits for it one input later, before the memory of the first is used again.
A copy back is ordered the same way. So no memory of the device is held for longer than two inputs, and nothing blocks the host.
Pinned memory is kept for the next pass, because the system takes long to give it. On other devices the copies are plain and immediate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class PinnedStore:
    """Pinned buffers, each for one tensor."""

    place = "pinned memory of the machine"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._free: list[Tensor] = []
        """uint8 buffers that hold nothing that is still needed."""
        self._leaving: _Leaving | None = None

    def free_bytes(self) -> int | None:
        """None: the machine's memory."""
        return None

    def store(self, x: Tensor, /) -> "PinnedTensor":
        """Begin to copy `x` out."""
        x = x.contiguous()
        buffer = self._take(x.nbytes)
        stored = PinnedTensor(self, buffer, buffer[: x.nbytes].view(x.dtype).view(x.shape))
        self.release()
        if self.device.type != "cuda":
            stored.host.copy_(x)
            return stored
        with torch.cuda.stream(self._side()):
            stored.host.copy_(x, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._leaving = _Leaving(x, copied)
        return stored

    def release(self) -> None:
        """Give up the tensor that is copied out; the pass goes on once that is done."""
        if self._leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self._leaving.copied)
            self._leaving = None

    def copy_back(self, host: Tensor) -> "tuple[Tensor, torch.cuda.Event | None]":
        """A tensor on the device into which `host` is being copied, and the end of the copy; None if it has ended."""
        x = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        if self.device.type != "cuda":
            return x.copy_(host), None
        side = self._side()
        with torch.cuda.stream(side):
            x.copy_(host, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        x.record_stream(side)  # or its memory could be used again while it is filled, if it is given up unread
        return x, copied

    def give_back(self, buffer: Tensor) -> None:
        """What is in `buffer` is not needed any more; the next copy into it comes after those that are queued, on the same stream."""
        self._free.append(buffer)

    def _side(self) -> "torch.cuda.Stream":
        """The stream of the copies, which waits for what the pass has queued so far."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._stream

    def _take(self, nbytes: int) -> Tensor:
        """The smallest free buffer of at least `nbytes`, or a new one, for which the smallest free one is given up."""
        self._free.sort(key=lambda buffer: buffer.nbytes)
        number = next((number for number, buffer in enumerate(self._free) if buffer.nbytes >= nbytes), None)
        if number is not None:
            return self._free.pop(number)
        if self._free:
            del self._free[0]
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


@dataclass(frozen=True, eq=False)
class _Leaving:
    """A tensor that is copied out: its memory must stay until then."""

    x: Tensor
    copied: "torch.cuda.Event"


class PinnedTensor:
    """A tensor in a PinnedStore."""

    def __init__(self, store: PinnedStore, buffer: Tensor, host: Tensor) -> None:
        self.host = host
        self._store, self._buffer = store, buffer
        self._coming: tuple[Tensor, torch.cuda.Event | None] | None = None

    def fetch(self) -> None:
        """Begin to copy it back."""
        self._store.release()
        if self._coming is None:
            self._coming = self._store.copy_back(self.host)

    def load(self) -> Tensor:
        """The tensor on the device; the pass waits for its copy, the host does not."""
        self.fetch()
        assert self._coming is not None
        (x, copied), self._coming = self._coming, None
        if copied is not None:
            torch.cuda.current_stream(self._store.device).wait_event(copied)
        return x

    def __del__(self) -> None:
        self._store.give_back(self._buffer)
