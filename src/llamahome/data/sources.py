"""Files to rows: a JSONL file, a folder of them or a glob, any row by its number, without reading them all.

Cost: one pass over the bytes at disk speed for the line offsets (16 bytes of memory per row); afterwards a row is one slice of a
memory map and one JSON parse. Blank lines are not rows, but line numbers stay those that an editor shows.
"""

import bisect
import mmap
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.data.jsonrow import parse_row
from llamahome.data.locate import locate
from llamahome.data.records import Row
from llamahome.errors import DataError, Problem

_CHUNK = 1 << 24
"""Bytes searched for line ends at a time; bounds the memory of the pass."""
_OPEN_FILES = 64
"""Memory maps kept open; a folder may hold more files than a process may open."""
_BOM = b"\xef\xbb\xbf"
_NOT_UTF8 = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True)
class _Index:
    """Where the rows of one file are."""

    starts: NDArray[np.int64]
    lines: NDArray[np.int64]
    size: int
    modified_ns: int


class Source:
    """The rows of one or more files, in the order of the files and of their lines."""

    def __init__(self, paths: tuple[str, ...], *, ignored: tuple[str, ...] = ()) -> None:
        self.paths = paths
        self.ignored = ignored
        """Data files beside them that are not read."""
        self._indexes = [_index_file(path) for path in paths]
        self._ends = list(accumulate(len(index.starts) for index in self._indexes))
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row | Problem]:
        return (self.parsed(number) for number in range(len(self)))

    def row(self, number: int) -> Row:
        """Row `number`, counted over all files; raises DataError when it is not a JSON object."""
        row = self.parsed(number)
        if isinstance(row, Problem):
            raise DataError(row)
        return row

    def parsed(self, number: int) -> Row | Problem:
        """Row `number`, or what is wrong with it."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = bisect.bisect_right(self._ends, number)
        index = self._indexes[which]
        inside = number - (self._ends[which] - len(index.starts))
        content = self._map(which)
        start = int(index.starts[inside])
        end = content.find(b"\n", start)
        raw = content[start : end if end >= 0 else len(content)]
        return parse_row(raw, path=self.paths[which], line=int(index.lines[inside]), index=inside)

    def file_of(self, number: int) -> int:
        """Which of `paths` holds row `number`."""
        return bisect.bisect_right(self._ends, number)

    def close(self) -> None:
        """Give the memory maps back; a later read opens them again."""
        while self._maps:
            self._maps.popitem()[1].close()

    def _map(self, which: int) -> mmap.mmap:
        if which in self._maps:
            self._maps.move_to_end(which)
            return self._maps[which]
        path, index = self.paths[which], self._indexes[which]
        opened = _open_map(path)
        if opened is None or _stamp(path) != (index.size, index.modified_ns):
            raise DataError(Problem(code="data.file-changed", message="the file was changed while it was read", where=path))
        if len(self._maps) >= _OPEN_FILES:
            self._maps.popitem(last=False)[1].close()
        self._maps[which] = opened
        return opened


def open_source(path: str) -> Source:
    """Index the file, the folder or the glob `path`; raises DataError when there is nothing to read."""
    found = locate(path)
    source = Source(found.files, ignored=found.ignored)
    if len(source) == 0:
        single = len(found.files) == 1
        raise DataError(
            Problem(
                code="data.empty-file" if single else "data.empty-folder",
                message="the file holds no rows" if single else f"{len(found.files)} files hold no rows",
                where=found.files[0] if single else path,
                hint="one JSON object a line; `llamahome data sample FILE` writes an example",
            )
        )
    return source


def _stamp(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def _open_map(path: str) -> mmap.mmap | None:
    """A read-only map of the file, None when it is empty."""
    try:
        with Path(path).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if _stamp(path)[0] else None
    except OSError as error:
        hint = f"chmod u+r '{path}'" if isinstance(error, PermissionError) else None
        message = f"cannot read the file: {error.strerror}"
        raise DataError(Problem(code="data.unreadable", message=message, where=path, hint=hint)) from error


def _index_file(path: str) -> _Index:
    content = _open_map(path)
    if content is None:
        return _Index(np.empty(0, np.int64), np.empty(0, np.int64), *_stamp(path))
    with content:
        encoding = _NOT_UTF8.get(content[:2])
        if encoding is not None:
            raise DataError(
                Problem(
                    code="data.not-utf8",
                    message=f"the file is {encoding}, not UTF-8",
                    where=f"{path}:1",
                    hint=f"iconv -f {encoding} -t UTF-8 '{path}' > '{Path(path).with_suffix('')}-utf8.jsonl'",
                )
            )
        breaks = _line_breaks(content)
        starts = np.concatenate((np.zeros(1, np.int64), breaks + 1))
        ends = np.concatenate((breaks, np.full(1, len(content), np.int64)))
        if content[:3] == _BOM:
            starts[0] = 3
        kept = _not_blank(content, starts, ends)
    return _Index(starts[kept], kept + 1, *_stamp(path))


def _line_breaks(content: mmap.mmap) -> NDArray[np.int64]:
    found = []
    for begin in range(0, len(content), _CHUNK):
        chunk = np.frombuffer(content[begin : begin + _CHUNK], np.uint8)
        found.append(np.flatnonzero(chunk == 10).astype(np.int64) + begin)
    return np.concatenate(found)


def _not_blank(content: mmap.mmap, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the lines that hold more than white space; only lines that begin with some are looked at."""
    kept = ends > starts
    candidates = np.flatnonzero(kept)
    view = np.frombuffer(content, np.uint8)
    doubtful = candidates[np.isin(view[starts[candidates]], (9, 11, 12, 13, 32))]
    del view  # a map cannot be closed while an array looks into it
    for line in doubtful.tolist():
        kept[line] = bool(content[int(starts[line]) : int(ends[line])].strip())
    return np.flatnonzero(kept)
