"""A data file that must not change while it is read: every read checks it, and a file that changed or was truncated is refused.

Bytes are read with pread, never through a memory map, because a truncated map ends the process with a signal instead of an error.
Cost: one stat for each read, about a microsecond.
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.errors import DataError, Problem
from llamahome.progress_marks import marks

LONGEST_ROW = 1 << 26
"""Bytes (64 MiB); a longer row is a missing line end or an unclosed quote, and reading it would fill the memory."""
_HEAD = 1 << 16


@dataclass(frozen=True)
class ReaderLimits:
    """Sizes that bound the memory, the disk and the open files of the readers; bytes, unless the name says otherwise."""

    block: int = 1 << 20
    """Scanned or copied at a time. Measured: line ends are found at 5 GB/s in blocks of 1 MiB, at 3 GB/s in blocks of 16 MiB."""
    batch: int = 1 << 22
    """Neighbouring rows that are read with one call."""
    row: int = LONGEST_ROW
    text_row: int = 1 << 20
    """A longer text is cut into several rows; a text is learned in pieces of max_length tokens anyhow."""
    cached_file: int = 1 << 24
    """A smaller file is indexed and hashed faster than people notice, so nothing about it is cached."""
    buffered_numbers: int = 1 << 17
    """Numbers of an index (1 MiB) that are held before they are written."""
    open_files: int = 64
    """A folder may hold more files than a process may open."""
    decoded: int = 1 << 27
    """Decoded row groups that are kept, over all Parquet files of a source."""
    row_group: int = 1 << 26
    """The largest row group, before compression, that is decoded at once."""
    copied_rows: int = 1024
    """Rows in each batch of an Arrow copy."""
    free_disk: int = 1 << 28
    """Space that a copy leaves free on the disk."""


LIMITS = ReaderLimits()


@dataclass(frozen=True)
class Stamp:
    """What distinguishes one state of a file from another."""

    size: int
    modified_ns: int
    inode: int
    changed_ns: int
    """Time of the last change as the system noted it; a program that sets the modification time back cannot set this one."""
    attributes: tuple[int, int, int, int]
    """Mode, owner, group and number of links: a change of these moves `changed_ns` although the content is the same."""


class GuardedFile:
    """One file, opened at the first read. `path` is what people know; `place` is what is read, for example the unpacked copy."""

    def __init__(self, path: str, *, place: str | None = None, limits: ReaderLimits = LIMITS) -> None:
        self.path, self.place, self.limits = path, place or path, limits
        self.stamp = stamp_of(self.place)
        self._stamps = {self.place: self.stamp, path: stamp_of(path)}
        self._descriptor: int | None = None

    @property
    def size(self) -> int:
        """Bytes of what is read."""
        return self.stamp.size

    @property
    def origin(self) -> Stamp:
        """The stamp of `path`: the archive, if the file was unpacked."""
        return self._stamps[self.path]

    @property
    def is_copy(self) -> bool:
        """Whether a copy in the cache is read instead of the file itself."""
        return self.place != self.path

    def check(self) -> None:
        """Raise DataError if the file, or the archive it came from, has changed since it was opened."""
        for path, stamp in self._stamps.items():
            try:
                status = os.stat(path)  # noqa: PTH116 (three times as fast as Path.stat, and called for every row)
            except OSError as error:
                raise DataError(self._changed("is gone" if isinstance(error, FileNotFoundError) else "can no longer be read")) from error
            if status.st_mtime_ns != stamp.modified_ns or status.st_size != stamp.size:
                raise DataError(self._changed("was changed while it was read"))
            if status.st_ctime_ns != stamp.changed_ns:
                now = _stamp(status)
                if now.inode != stamp.inode or now.attributes == stamp.attributes:  # so the content changed and the time was set back
                    raise DataError(self._changed("was changed while it was read, and its time was set back"))
                self._stamps[path] = now
        marks.advance()

    def head(self) -> bytes:
        """The first 64 KiB."""
        return self.read(0, min(_HEAD, self.size))

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`; raises DataError if the file changed."""
        self.check()
        if self._descriptor is None:
            self._descriptor = self._open()
        try:
            content = os.pread(self._descriptor, end - begin, begin)
        except OSError as error:
            raise DataError(unreadable(self.path, error)) from error
        if len(content) != end - begin:
            raise DataError(self._changed("was changed while it was read"))
        marks.advance()
        return content

    def blocks(self, begin: int = 0) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The file from `begin` on, in order, as (offset, bytes); the next block overwrites the array."""
        buffer = bytearray(min(self.limits.block, max(1, self.size - begin)))
        view, array, offset = memoryview(buffer), np.frombuffer(buffer, np.uint8), begin
        self.check()
        descriptor = self._open()
        try:
            while offset < self.size:
                count = os.preadv(descriptor, [view[: min(len(buffer), self.size - offset)]], offset)
                if not count:
                    raise DataError(self._changed("was changed while it was read"))
                marks.advance()
                yield offset, array[:count]
                offset += count
        except OSError as error:
            raise DataError(unreadable(self.path, error)) from error
        finally:
            os.close(descriptor)
        self.check()

    def lines(self, begin: int) -> Iterator[tuple[int, bytes]]:
        """The lines from `begin` on as (offset, line with its end); a line longer than a row may be comes in pieces."""
        self.check()
        offset = begin
        with os.fdopen(self._open(), "rb") as file:
            file.seek(begin)
            while offset < self.size:
                line = file.readline(min(self.limits.row, self.size - offset))
                if not line:
                    raise DataError(self._changed("was changed while it was read"))
                marks.advance()
                yield offset, line
                offset += len(line)
        self.check()

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        try:
            return os.open(self.place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(unreadable(self.path, error)) from error

    def _changed(self, what: str) -> Problem:
        hint = "run again when no other program writes to it, or give a copy under another name"
        return Problem(code="data.file-changed", message=f"the file {what}", where=self.path, hint=hint)


def stamp_of(path: str) -> Stamp:
    """Size, times and inode of a file; raises DataError if the system does not tell."""
    try:
        return _stamp(Path(path).stat())
    except OSError as error:
        raise DataError(unreadable(path, error)) from error


def _stamp(status: os.stat_result) -> Stamp:
    attributes = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns, attributes)


def unreadable(path: str, error: OSError, *, what: str = "file") -> Problem:
    """The problem of a file or folder that the system refuses to read."""
    letters = "rx" if what == "folder" else "r"
    hint = f"chmod u+{letters} {shlex.quote(path)}" if isinstance(error, PermissionError) else None
    return Problem(code="data.unreadable", message=f"cannot read the {what}: {error.strerror or error}", where=path, hint=hint)
