"""Arrays about a data file (where its rows begin, their hashes), cached on disk so that the next start loads them at once.

Arrays lie under data/training/processed/index/ as `<name>-<key>.<what>`. Each is written to a temporary file with a checksum and renamed
once; an array that is damaged or belongs to another file is computed again. If the folder cannot be written the arrays stay in memory.
Cost: 8 bytes a row for each array, memory-mapped.
"""

import contextlib
import hashlib
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from llamahome import durable
from llamahome.data.files.guarded_file import GuardedFile
from llamahome.rundir import PROCESSED_DATA

Notify = Callable[[str], None]
"""Takes a sentence for people, such as that there is no cache."""
RowStarts = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Offsets of some rows and their lines. The last such pair of a scan holds one offset more, the end of the last row."""

NO_LINES = np.empty(0, np.int64)
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ8s")
_MAGIC = b"LLHINDEX"


@dataclass(frozen=True)
class RowIndex:
    """Row i is the bytes from starts[i] to starts[i + 1] and begins in line lines[i]."""

    starts: NDArray[np.int64]
    lines: NDArray[np.int64]
    """Empty if row i is in line i + 1, as in most JSONL files."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def line(self, number: int) -> int:
        """One-based line of row `number`."""
        return int(self.lines[number]) if len(self.lines) else number + 1


def cache_name(file: GuardedFile, reader: str) -> str:
    """`<name>-<key>`, the beginning of every cached file's name; the key is 16 hex digits of the path and 16 of the state and reader."""
    name = re.sub(r"[^\w.-]", "_", Path(file.path).name, flags=re.ASCII)[:60]
    full = os.path.abspath(file.path)  # noqa: PTH100 (Path.absolute keeps "..", resolve looks up every part on the disk)
    status = file.stamp
    state = f"{_VERSION} {reader} {status.size} {status.modified_ns} {status.changed_ns} {status.inode}"
    return f"{name}-{_hex(full)}{_hex(state)}"


def remove_older(folder: Path, name: str) -> None:
    """Remove what is cached of earlier states of the file that `name` (from cache_name) belongs to."""
    with contextlib.suppress(OSError):
        for old in folder.glob(f"{name[:-16]}*"):
            if not old.name.startswith(name) and not old.name.endswith((".tmp", ".lock")):
                old.unlink(missing_ok=True)


class ArrayCache:
    """The cached arrays of one file, read by one reader."""

    def __init__(self, file: GuardedFile, reader: str, notify: Notify) -> None:
        self._file, self._notify = file, notify
        self._folder = PROCESSED_DATA / "index" if file.size >= file.limits.cached_file else None
        self._name = cache_name(file, reader)
        self._verified: set[str] = set()

    def load(self, what: str) -> NDArray[np.int64] | None:
        """The array `what`, memory-mapped; None if it is missing or damaged."""
        if self._folder is None:
            return None
        path = self._folder / f"{self._name}.{what}"
        try:
            with path.open("rb") as file:
                count = self._verify(file, what, path.stat().st_size)
            if count is None:
                return None
            self._verified.add(what)
            return np.asarray(np.memmap(path, np.int64, "r", _HEADER.size, (count,))) if count else np.empty(0, np.int64)
        except OSError:
            return None

    def load_index(self) -> RowIndex | None:
        """The row index; None unless both of its arrays are cached."""
        starts, lines = self.load("starts"), self.load("lines")
        if starts is None or lines is None or len(starts) == 0 or len(lines) not in (0, len(starts) - 1):
            return None
        return RowIndex(starts, lines)

    def build_index(self, scan: Iterable[RowStarts]) -> RowIndex:
        """Cache the row index that a scan yields."""
        chunk = self._file.limits.buffered_numbers
        with self._writer("starts") as starts, self._writer("lines") as lines:
            count, one_row_per_line = 0, True
            for offsets, numbers in scan:
                starts.append(offsets)
                if one_row_per_line and not np.array_equal(numbers, np.arange(count + 1, count + len(numbers) + 1)):
                    one_row_per_line = False
                    for begin in range(0, count, chunk):
                        lines.append(np.arange(begin + 1, min(begin + chunk, count) + 1))
                if not one_row_per_line:
                    lines.append(numbers)
                count += len(numbers)
            return RowIndex(starts.finish(), lines.finish())

    def hashes(self, count: int, compute: Callable[[], Iterator[bytes]]) -> NDArray[np.uint64]:
        """The hashes of `count` rows, cached; `compute` yields them as joined big-endian digests of 64 bits."""
        hashes = self.load("hashes")
        if hashes is None or len(hashes) != count:
            self._file.check()
            with self._writer("hashes") as writer:
                for digests in compute():
                    writer.append(np.frombuffer(digests, ">u8").astype(np.uint64).view(np.int64))
                hashes = writer.finish()
        return hashes.view(np.uint64)

    def _writer(self, what: str) -> "_ArrayWriter":
        return _ArrayWriter(self, what, self._folder, self._name, self._file.limits.buffered_numbers, self._notify)

    def _verify(self, file: BinaryIO, what: str, size: int) -> int | None:
        """How many numbers the file holds; None if it is damaged. The checksum is computed once in a process."""
        head = file.read(_HEADER.size)
        if len(head) != _HEADER.size:
            return None
        magic, version, checksum, count, owner = _HEADER.unpack(head)
        if (magic, version, owner) != (_MAGIC, _VERSION, _owner(self._name, what)) or size != _HEADER.size + 8 * count:
            return None
        actual = checksum if what in self._verified else 0
        while what not in self._verified and (part := file.read(8 * self._file.limits.buffered_numbers)):
            actual = zlib.crc32(part, actual)
        return int(count) if actual == checksum else None


class _ArrayWriter:
    """Writes numbers to the cache; keeps them in memory if there is no cache or no room for it."""

    def __init__(self, cache: ArrayCache, what: str, folder: Path | None, name: str, buffered: int, notify: Notify) -> None:
        self._cache, self._what, self._folder, self._name, self._notify = cache, what, folder, name, notify
        self._buffered = buffered
        self._parts: list[NDArray[np.int64]] = []
        self._in_memory = self._count = self._checksum = 0
        self._file: BinaryIO | None = None
        self._partial = Path()
        if folder is not None:
            self._partial = folder / f"{name}.{what}.{os.getpid()}-{threading.get_ident()}.tmp"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                durable.remove_remains(folder, "*.tmp")
                self._file = self._partial.open("w+b", buffering=0)
                self._write(bytes(_HEADER.size))
            except OSError as error:
                self._give_up(error)

    def __enter__(self) -> "_ArrayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._partial.unlink(missing_ok=True)

    def append(self, numbers: NDArray[np.int64]) -> None:
        """Add numbers at the end."""
        self._parts.append(numbers)
        self._in_memory += len(numbers)
        if self._in_memory >= self._buffered and self._file is not None:
            self._flush()

    def finish(self) -> NDArray[np.int64]:
        """All numbers, memory-mapped from the cache if it could be written."""
        if self._file is not None:
            self._flush()
        if self._file is not None:
            try:
                self._file.seek(0)
                self._write(_HEADER.pack(_MAGIC, _VERSION, self._checksum, self._count, _owner(self._name, self._what)))
                self._partial.replace(self._partial.with_name(f"{self._name}.{self._what}"))
                remove_older(self._partial.parent, self._name)
            except OSError as error:
                self._give_up(error)
            else:
                cached = self._cache.load(self._what)
                if cached is not None:
                    return cached
                self._give_up(OSError("the cache cannot be read back"))
        return np.concatenate([np.empty(0, np.int64), *self._parts])

    def _flush(self) -> None:
        numbers = np.concatenate([np.empty(0, np.int64), *self._parts])
        raw = numbers.astype("<i8", copy=False).tobytes()
        try:
            self._write(raw)
        except OSError as error:
            self._give_up(error)
            return
        self._checksum = zlib.crc32(raw, self._checksum)
        self._count += len(numbers)
        self._parts, self._in_memory = [], 0

    def _write(self, raw: bytes) -> None:
        assert self._file is not None
        left = memoryview(raw)
        while left:
            left = left[self._file.write(left) :]

    def _give_up(self, error: OSError) -> None:
        """Continue in memory, beginning with what was written so far."""
        self._notify(f"no index is kept under {self._folder}: {error.strerror or error}; the next start searches the files again")
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.seek(_HEADER.size)
                self._parts.insert(0, np.frombuffer(self._file.read(8 * self._count), "<i8").astype(np.int64))
            self.__exit__()


def _hex(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _owner(name: str, what: str) -> bytes:
    """Binds the content to the file's name, so that a renamed file is not believed."""
    return hashlib.blake2b(f"{name}.{what}".encode(), digest_size=8).digest()
