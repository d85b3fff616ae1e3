"""Inputs of layers in a file, where the device's memory is the machine's, so that only a disk can take them.

The file has no name, so it vanishes with the process whatever ends it. One thread writes and reads it beside the passes. What was written
goes to the disk soon and leaves the system's cache, or it would stay in memory after all.
"""

import errno
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamahome.errors import MachineError, Problem

_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = {"tmpfs", "ramfs"}
_PAGE = 4096
_CACHED_BYTES = 1 << 25
"""Written bytes that may stay in the system's cache: to flush every small one would wait for the disk, milliseconds each."""


def store_folder() -> Path:
    """TMPDIR, or /var/tmp, which is on a disk where /tmp is often in memory."""
    named, lasting = os.environ.get("TMPDIR"), Path("/var/tmp")
    return Path(named) if named else lasting if lasting.is_dir() else Path(tempfile.gettempdir())


def file_store(folder: Path | None = None) -> "FileStore | str":
    """A store in a file in `folder`, store_folder() by default; else the reason why there is none."""
    folder = folder or store_folder()
    if _kind_of_disk(folder.resolve()) in _IN_MEMORY:
        return f"{folder} is in memory itself; TMPDIR can name a folder on a disk"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return FileStore(folder)
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or error}"


def _kind_of_disk(folder: Path) -> str:
    """The file system of the innermost mount that holds `folder`; empty if the system does not tell."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    found = [(Path(line.split()[4].replace("\\040", " ")), line.partition(" - ")[2].split()[0]) for line in lines if " - " in line]
    holding = [(len(point.parts), number, kind) for number, (point, kind) in enumerate(found) if folder.is_relative_to(point)]
    return max(holding)[2] if holding else ""


class FileStore:
    """A file of places, each for one tensor; the file is made when the first tensor comes."""

    def __init__(self, folder: Path) -> None:
        self.place = f"a file in {folder}"
        self._folder = folder
        self._file: Any = None
        self._thread = ThreadPoolExecutor(1, "offload")
        self._writing: Future[None] | None = None
        self._places: list[tuple[int, int]] = []
        """Free places: size and offset."""
        self._used, self._end, self._cached = 0, 0, 0

    def __del__(self) -> None:
        self._thread.shutdown(wait=False)
        if self._file is not None:
            self._file.close()

    def free_bytes(self) -> int | None:
        """Free bytes on the disk, for all processes together."""
        disk = os.statvfs(self._folder)
        return disk.f_bavail * disk.f_frsize

    def store(self, x: Tensor, /) -> "FileTensor":
        """Begin to write `x`; waits until the one before it is written, so that not more than one is held for that.

        Raises MachineError if that failed.
        """
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - lives as long as the store
        if self._writing is not None:
            self._writing.result()
        size = -(-x.nbytes // _PAGE) * _PAGE
        offset = self._take(size)
        self._writing = self._thread.submit(self._write, x.contiguous(), offset)
        return FileTensor(self, (size, offset), self._writing, x)

    def read(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> "Future[Tensor]":
        """Begin to read a tensor, after what is still to be written."""
        return self._thread.submit(self._read, offset, shape, dtype)

    def give_back(self, place: tuple[int, int]) -> None:
        """The tensor in `place` is not needed any more."""
        self._used -= 1
        self._places.append(place)
        if not self._used:  # the pass is over, and the next may have tensors of another size
            self._places, self._end = [], 0

    def _take(self, size: int) -> int:
        self._used += 1
        fitting = next((place for place in self._places if place[0] == size), None)
        if fitting is not None:
            self._places.remove(fitting)
            return fitting[1]
        self._end += size
        return self._end - size

    def _write(self, x: Tensor, offset: int) -> None:
        number, rest = self._file.fileno(), _memory(x)
        start, size = offset, len(rest)
        try:
            while rest:
                done = os.pwrite(number, rest, start)
                rest, start = rest[done:], start + done
            self._cached += size
            if self._cached > _CACHED_BYTES:
                os.fdatasync(number)
                _leave_cache(number, 0, 0)
                self._cached = 0
        except OSError as error:
            raise self._failed("written", error) from error

    def _read(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype)
        number, rest = self._file.fileno(), _memory(x)
        start, size = offset, len(rest)
        try:
            while rest:
                done = os.preadv(number, [rest], start)
                if not done:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                rest, start = rest[done:], start + done
        except OSError as error:
            raise self._failed("read", error) from error
        _leave_cache(number, offset, size)
        return x

    def _failed(self, verb: str, error: OSError) -> MachineError:
        message = f"offloaded activations cannot be {verb}: {self.place}: {error.strerror or error}"
        hint = "--set training.activation_offloading=false, or TMPDIR=DIR on a disk with room"
        return MachineError(Problem(code="training.offload-failed", message=message, where="training.activation_offloading", hint=hint))


class FileTensor:
    """A tensor in a FileStore."""

    def __init__(self, store: FileStore, place: tuple[int, int], written: "Future[None]", x: Tensor) -> None:
        self._store, self._place, self._written, self._shape, self._dtype = store, place, written, x.shape, x.dtype
        self._coming: Future[Tensor] | None = None

    def fetch(self) -> None:
        """Begin to read it."""
        if self._coming is None:
            self._coming = self._store.read(self._place[1], self._shape, self._dtype)

    def load(self) -> Tensor:
        """The tensor; waits until it is read. Raises MachineError if it was not written or cannot be read."""
        self.fetch()
        coming, self._coming = self._coming, None
        assert coming is not None
        self._written.result()
        return coming.result()

    def __del__(self) -> None:
        self._store.give_back(self._place)


def _memory(x: Tensor) -> memoryview:
    array: Any = x.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _leave_cache(number: int, offset: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(number, offset, size, os.POSIX_FADV_DONTNEED)
