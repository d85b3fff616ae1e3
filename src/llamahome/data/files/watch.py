"""A data file that must stay as it is while it is read: every read goes through here, and a change or truncation is refused.

Bytes are read with pread, never through a memory map, so that a file cut short under a run ends in an error and not in a signal.
Cost: one stat a read, about a microsecond.
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.errors import DataError, Problem

LONGEST_ROW = 1 << 26
"""Bytes (64 MiB); a longer row is a missing line end or an unclosed quote, and reading it whole would fill the memory."""
_BLOCK = 1 << 20
"""Bytes searched at a time. Measured: line ends are found at 5 GB/s in blocks of 1 MiB, at 3 GB/s in blocks of 16."""


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file is still the one that was looked at."""

    size: int
    modified_ns: int
    inode: int
    changed_ns: int
    """When the system last noted a change; programs that set the time of a file back cannot set this one."""
    around: tuple[int, int, int, int]
    """Rights, owner, group and number of names: what may change, and move `changed_ns`, without the content."""


class WatchedFile:
    """One file, opened when it is first read. `path` is what people know; `place` is read, where the file was unpacked."""

    def __init__(self, path: str, *, place: str | None = None) -> None:
        self.path, self.place = path, place or path
        self.stamp = stamp_of(self.place)
        self._watched = {self.place: self.stamp, path: stamp_of(path)}
        self._descriptor: int | None = None

    @property
    def size(self) -> int:
        """Bytes of what is read."""
        return self.stamp.size

    @property
    def origin(self) -> Stamp:
        """The stamp of `path`, the archive where the file was unpacked."""
        return self._watched[self.path]

    def check(self) -> None:
        """Raise DataError when the file, or the archive it came from, is no longer what it was."""
        for path, stamp in self._watched.items():
            try:
                status = os.stat(path)  # noqa: PTH116 (three times as fast as Path.stat, and called for every row)
            except OSError as error:
                raise DataError(self._changed("is gone" if isinstance(error, FileNotFoundError) else "can no longer be read")) from error
            if status.st_mtime_ns != stamp.modified_ns or status.st_size != stamp.size:
                raise DataError(self._changed("was changed while it was read"))
            if status.st_ctime_ns != stamp.changed_ns:
                now = _stamp(status)
                if now.inode != stamp.inode or now.around == stamp.around:  # only new content with the old time set back explains it
                    raise DataError(self._changed("was changed while it was read, and its time set back"))
                self._watched[path] = now

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`; raises DataError when the file changed."""
        self.check()
        if self._descriptor is None:
            self._descriptor = self._open()
        try:
            found = os.pread(self._descriptor, end - begin, begin)
        except OSError as error:
            raise DataError(unreadable(self.path, error)) from error
        if len(found) != end - begin:
            raise DataError(self._changed("was changed while it was read"))
        return found

    def blocks(self, begin: int = 0) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The file from `begin` on, in order, as (offset, bytes); the array is overwritten by the next block."""
        buffer = bytearray(min(_BLOCK, max(1, self.size - begin)))
        view, array, offset = memoryview(buffer), np.frombuffer(buffer, np.uint8), begin
        self.check()
        descriptor = self._open()
        try:
            while offset < self.size:
                count = os.preadv(descriptor, [view[: min(len(buffer), self.size - offset)]], offset)
                if not count:
                    raise DataError(self._changed("was changed while it was read"))
                yield offset, array[:count]
                offset += count
        except OSError as error:
            raise DataError(unreadable(self.path, error)) from error
        finally:
            os.close(descriptor)
        self.check()

    def lines(self, begin: int) -> Iterator[tuple[int, bytes]]:
        """The lines from `begin` on as (offset, line with its end); one over 64 MiB comes in pieces."""
        self.check()
        offset = begin
        with os.fdopen(self._open(), "rb") as file:
            file.seek(begin)
            while offset < self.size:
                line = file.readline(min(LONGEST_ROW, self.size - offset))
                if not line:
                    raise DataError(self._changed("was changed while it was read"))
                yield offset, line
                offset += len(line)
        self.check()

    def close(self) -> None:
        """Give the file back; a later read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        try:
            return os.open(self.place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(unreadable(self.path, error)) from error

    def _changed(self, what: str) -> Problem:
        hint = "run again when nothing writes to it; a copy under another name stays as it is"
        return Problem(code="data.file-changed", message=f"the file {what}", where=self.path, hint=hint)


def stamp_of(path: str) -> Stamp:
    """Size, time and inode of a file; raises DataError when it cannot be asked."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise DataError(unreadable(path, error)) from error
    return _stamp(status)


def _stamp(status: os.stat_result) -> Stamp:
    around = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns, around)


def unreadable(path: str, error: OSError, *, what: str = "file") -> Problem:
    """The problem of a file or folder that the system will not give."""
    letters = "rx" if what == "folder" else "r"
    hint = f"chmod u+{letters} {shlex.quote(path)}" if isinstance(error, PermissionError) else None
    return Problem(code="data.unreadable", message=f"cannot read the {what}: {error.strerror or error}", where=path, hint=hint)
