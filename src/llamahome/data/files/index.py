"""Where the rows of a file begin, and their hashes, kept beside the data so that the next start finds them at once.

Arrays lie under data/training/processed/index/ as `<name>-<fingerprint>.<what>`, one write and one rename each, with a checksum: a damaged
or foreign file is built again, never trusted. Without a place to write they stay in memory. Cost: 8 bytes a row for each array, mapped.
"""

import contextlib
import hashlib
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.watch import WatchedFile
from llamahome.rundir import PROCESSED_DATA

Tell = Callable[[str], None]
"""Takes a sentence for people, such as that there is no cache."""
Piece = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Starts of some rows and their lines; the last piece holds one start more, which is where the last row ends."""

_VERSION = 1
_HEADER = struct.Struct("<8sIIQ8s")
_MAGIC = b"LLHINDEX"
_WORTH_CACHING = 1 << 24
"""Bytes (16 MiB) of a file; a smaller one is indexed and hashed faster than people notice."""
NO_LINES = np.empty(0, np.int64)
_FLUSH = 1 << 17
"""Numbers (1 MiB) held before they are written."""


@dataclass(frozen=True)
class RowIndex:
    """Row i is the bytes from starts[i] to starts[i + 1], and stands in line lines[i]."""

    starts: NDArray[np.int64]
    lines: NDArray[np.int64]
    """Empty when row i stands in line i + 1, as in most JSONL files."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def line(self, number: int) -> int:
        """One-based line of row `number`."""
        return int(self.lines[number]) if len(self.lines) else number + 1


def key_of(file: WatchedFile, reader: str) -> str:
    """32 hex digits: 16 of the file's full path, 16 of its size, times, inode and of how it is read."""
    status = file.stamp
    rest = f"{_VERSION} {reader} {status.size} {status.modified_ns} {status.changed_ns} {status.inode}"
    return "".join(hashlib.blake2b(part.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest() for part in (_full(file), rest))


def cache_name(file: WatchedFile, reader: str) -> str:
    """`<name>-<key>`, which is what every cached thing of the file begins with."""
    name = re.sub(r"[^\w.-]", "_", Path(file.path).name, flags=re.ASCII)[:60]
    return f"{name}-{key_of(file, reader)}"


def forget_older(folder: Path, name: str) -> None:
    """Remove what is kept of earlier states of the file that `name` (from cache_name) belongs to."""
    with contextlib.suppress(OSError):
        for old in folder.glob(f"{name[:-16]}*"):
            if not old.name.startswith(name) and not old.name.endswith((".tmp", ".lock")):
                old.unlink(missing_ok=True)


class Shelf:
    """The cached arrays of one file, read in one way."""

    def __init__(self, file: WatchedFile, reader: str, tell: Tell) -> None:
        self._folder = PROCESSED_DATA / "index" if file.size >= _WORTH_CACHING else None
        self._name, self._tell = cache_name(file, reader), tell
        self._verified: set[str] = set()

    def load(self, what: str) -> NDArray[np.int64] | None:
        """The array `what`, mapped; None when it is not there or not whole."""
        if self._folder is None:
            return None
        path = self._folder / f"{self._name}.{what}"
        try:
            with path.open("rb") as file:
                count = self._count(file, what, path.stat().st_size)
            if count is None:
                return None
            self._verified.add(what)
            return np.asarray(np.memmap(path, np.int64, "r", _HEADER.size, (count,))) if count else np.empty(0, np.int64)
        except OSError:
            return None

    def keep(self, what: str) -> "Writer":
        """A writer of the array `what`."""
        return Writer(self, self._folder, f"{self._name}.{what}", self._tell)

    def seal(self, what: str, count: int, checksum: int) -> bytes:
        """The header of an array."""
        return _HEADER.pack(_MAGIC, _VERSION, checksum, count, _seal(self._name, what))

    def load_index(self) -> RowIndex | None:
        """The starts and lines, when both are there."""
        starts, lines = self.load("starts"), self.load("lines")
        if starts is None or lines is None or len(starts) == 0 or len(lines) not in (0, len(starts) - 1):
            return None
        return RowIndex(starts, lines)

    def build_index(self, pieces: Iterable[Piece]) -> RowIndex:
        """Keep what a scan finds."""
        with self.keep("starts") as starts, self.keep("lines") as lines:
            count, plain = 0, True
            for some, numbers in pieces:
                starts.append(some)
                expected = np.arange(count + 1, count + len(numbers) + 1)
                if plain and not np.array_equal(numbers, expected):
                    plain = False
                    for begin in range(0, count, _FLUSH):
                        lines.append(np.arange(begin + 1, min(begin + _FLUSH, count) + 1))
                if not plain:
                    lines.append(numbers)
                count += len(numbers)
            return RowIndex(starts.finish(), lines.finish())

    def _count(self, file: BinaryIO, what: str, size: int) -> int | None:
        """How many numbers the file holds; None when it is not what it should be. The checksum is taken once in a process."""
        head = file.read(_HEADER.size)
        if len(head) != _HEADER.size:
            return None
        magic, version, checksum, count, seal = _HEADER.unpack(head)
        if (magic, version, seal) != (_MAGIC, _VERSION, _seal(self._name, what)) or size != _HEADER.size + 8 * count:
            return None
        found = checksum if what in self._verified else 0
        while what not in self._verified and (part := file.read(8 * _FLUSH)):
            found = zlib.crc32(part, found)
        return int(count) if found == checksum else None


class Writer:
    """Numbers to a file of the cache; to memory when there is no cache, or no room for it."""

    def __init__(self, shelf: Shelf, folder: Path | None, name: str, tell: Tell) -> None:
        self._shelf, self._folder, self._name, self._tell = shelf, folder, name, tell
        self._parts: list[NDArray[np.int64]] = []
        self._held = self._count = self._checksum = 0
        self._file: BinaryIO | None = None
        self._partial = Path()
        if folder is not None:
            self._partial = folder / f"{name}.{os.getpid()}-{threading.get_ident()}.tmp"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("w+b", buffering=0)
                self._write(bytes(_HEADER.size))
            except OSError as error:
                self._give_up(error)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._partial.unlink(missing_ok=True)

    def append(self, numbers: NDArray[np.int64]) -> None:
        """Add numbers at the end."""
        self._parts.append(numbers)
        self._held += len(numbers)
        if self._held >= _FLUSH and self._file is not None:
            self._flush()

    def finish(self) -> NDArray[np.int64]:
        """All numbers, mapped from the cache where it could be written."""
        if self._file is not None:
            self._flush()
        if self._file is not None:
            what = self._name.rpartition(".")[2]
            try:
                self._file.seek(0)
                self._write(self._shelf.seal(what, self._count, self._checksum))
                self._partial.replace(self._partial.with_name(self._name))
                forget_older(self._partial.parent, self._name.removesuffix(f".{what}"))
            except OSError as error:
                self._give_up(error)
            else:
                kept = self._shelf.load(what)
                if kept is not None:
                    return kept
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
        self._parts, self._held = [], 0

    def _write(self, raw: bytes) -> None:
        assert self._file is not None
        left = memoryview(raw)
        while left:
            left = left[self._file.write(left) :]

    def _give_up(self, error: OSError) -> None:
        """Go on in memory, with what was written so far."""
        self._tell(f"no index is kept under {self._folder}: {error.strerror or error}; the next start searches the files again")
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.seek(_HEADER.size)
                self._parts.insert(0, np.frombuffer(self._file.read(8 * self._count), "<i8").astype(np.int64))
            self.__exit__()


def _seal(name: str, what: str) -> bytes:
    """Binds the content to its name, so that a renamed file is not believed."""
    return hashlib.blake2b(f"{name}.{what}".encode(), digest_size=8).digest()


def _full(file: WatchedFile) -> str:
    return os.path.abspath(file.path)  # noqa: PTH100 (Path.absolute keeps "..", resolve asks the disk about every part)
