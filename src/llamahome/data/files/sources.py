"""Files to rows: any row by its number, over one or many files of any kind, without reading them all.

Every kind of file has a reader of the same shape (FileRows); this module puts them one after the other. Cost: one pass over each file for
where its rows begin, kept under data/training/processed/index; afterwards a row is one read and one parse. At most 64 files are open.
"""

import bisect
import hashlib
import os
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.arrow import ArrowBatches
from llamahome.data.files.delimited import table_layout
from llamahome.data.files.index import Tell
from llamahome.data.files.jsonarray import array_layout
from llamahome.data.files.jsonl import lines_layout
from llamahome.data.files.kinds import ending, kind_of
from llamahome.data.files.locate import Located, locate
from llamahome.data.files.parquet import Decoded, ParquetGroups
from llamahome.data.files.plaintext import text_layout
from llamahome.data.files.splits import TO_TRAIN, Wanted
from llamahome.data.files.spool import PACKED, unpacked
from llamahome.data.files.stretches import StretchRows
from llamahome.data.files.tabular import TableRows
from llamahome.data.files.watch import WatchedFile
from llamahome.data.records import Row
from llamahome.errors import DataError, Problem

_OPEN_FILES = 64
"""Files kept open; a folder may hold more than a process may open."""
_VERSION = 1
"""Of what rows the same bytes give; part of the fingerprint."""


class FileRows(Protocol):
    """The rows of one file."""

    def __len__(self) -> int: ...

    def parsed(self, number: int) -> Row | Problem:
        """Row `number` of the file, or what is wrong with it; DataError when the file cannot be read any more."""
        ...

    def parsed_range(self, numbers: range) -> list[Row | Problem]:
        """`parsed` of rows that follow each other."""
        ...

    def raw(self, number: int) -> bytes:
        """The bytes of the row as they stand; the row as JSON where there are none."""
        ...

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of each row's content."""
        ...

    def close(self) -> None:
        """Give back what is open; a later read opens it again."""
        ...


class Source:
    """The rows of one or more files, in the order of the files and of their rows. May be read from several threads."""

    def __init__(self, paths: tuple[str, ...], *, located: Located | None = None, say: Callable[[str], None] | None = None) -> None:
        self.paths = paths
        self.located = located or Located(paths)
        """What else there is: data files that are not read, rows to evaluate on, splits that are left alone."""
        self.notes: list[str] = []
        """What people should know about how the files are read; `say` was told each at once."""
        self._say = say
        self._lock = threading.RLock()
        self._open: OrderedDict[int, FileRows] = OrderedDict()
        self._files: list[FileRows] = []
        digest = hashlib.blake2b(digest_size=16)
        problems: list[Problem] = []
        decoded = Decoded()
        for path in paths:
            try:
                rows, stamp = _open_file(path, self.tell, decoded)
            except DataError as error:
                problems += error.problems
                continue
            digest.update(f"{os.path.relpath(path)}\0{stamp}\0".encode("utf-8", "surrogateescape"))
            self._files.append(rows)
            self._used(len(self._files) - 1)
        if problems:
            raise DataError(problems)
        self.fingerprint = digest.hexdigest()
        """Of what is read: names, sizes, times and readers; equal when the same rows come in the same order."""
        self._ends = list(accumulate(map(len, self._files)))

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
        """Row `number`, or what is wrong with it; raises DataError when its file changed."""
        with self._lock:
            rows, inside = self._find(number)
            return rows.parsed(inside)

    def parsed_range(self, numbers: range) -> list[Row | Problem]:
        """`parsed` of rows that follow each other: the same at a third of the cost, for lines are read together."""
        found: list[Row | Problem] = []
        while len(found) < len(numbers):
            with self._lock:
                rows, inside = self._find(numbers.start + len(found))
                found += rows.parsed_range(range(inside, min(len(rows), inside + len(numbers) - len(found))))
        return found

    def raw(self, number: int) -> bytes:
        """The bytes of row `number` as they stand in the file (a line without its end); JSON in one spelling for Parquet and Arrow."""
        with self._lock:
            rows, inside = self._find(number)
            return rows.raw(inside)

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of BLAKE2b of each row's content: equal rows of one kind of file have equal hashes."""
        found = []
        for which, rows in enumerate(self._files):
            with self._lock:
                self._used(which)
                found.append(rows.hashes())
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint64), *found])

    def file_of(self, number: int) -> int:
        """Which of `paths` holds row `number`."""
        return bisect.bisect_right(self._ends, number)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Data files beside them that are not read."""
        return self.located.ignored

    def close(self) -> None:
        """Give all files back; a later read opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def tell(self, note: str) -> None:
        """Say a sentence to people, each only once."""
        if note not in self.notes:
            self.notes.append(note)
            if self._say is not None:
                self._say(note)

    def _find(self, number: int) -> tuple[FileRows, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = self.file_of(number)
        self._used(which)
        rows = self._files[which]
        return rows, number - self._ends[which] + len(rows)

    def _used(self, which: int) -> None:
        """Count the file among those used last; the one longest unused is closed."""
        self._open[which] = self._files[which]
        self._open.move_to_end(which)
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()


def open_source(path: str | Sequence[str], *, say: Callable[[str], None] | None = None, wanted: Wanted = TO_TRAIN) -> Source:
    """Index the files, folders, globs or hub data sets that `path` names; `say` takes sentences for people, `wanted` chooses a split.

    Raises DataError when there is nothing to read, or a file is not what its name says.
    """
    notes: list[str] = []
    found = locate(path, say=notes.append, wanted=wanted)
    source = Source(found.files, located=found, say=say)
    for note in notes:
        source.tell(note)
    if len(source) == 0:
        single = len(found.files) == 1
        raise DataError(
            Problem(
                code="data.empty-file" if single else "data.empty-folder",
                message="the file holds no rows" if single else f"{len(found.files)} files hold no rows",
                where=found.files[0] if single else path if isinstance(path, str) else ", ".join(path),
                hint=_fill(found.files[0]) if single else "write rows into them, one JSON object a line",
            )
        )
    return source


def _fill(path: str) -> str:
    if ending(path) in (".jsonl", ".ndjson"):
        return f"llamahome data sample {shlex.quote(path)} --force   fills it with rows to begin with"
    return "write rows into it, or remove it"


def _open_file(path: str, tell: Tell, decoded: Decoded) -> tuple[FileRows, str]:
    """The file's rows, and what tells this state of it from another."""
    file = unpacked(path, tell) if Path(path).suffix.lower() in PACKED else WatchedFile(path)
    kind = kind_of(file)
    state = f"{_VERSION} {kind} {file.origin.size} {file.origin.modified_ns} {file.origin.changed_ns}"
    if kind == "parquet":
        return TableRows(file, ParquetGroups(file, decoded, tell), reader=kind, tell=tell), state
    if kind == "arrow":
        return TableRows(file, ArrowBatches(file), reader=kind, tell=tell), state
    if kind == "jsonl":
        layout = lines_layout(file)
    elif kind == "array":
        layout = array_layout(file)
    elif kind == "text":
        layout = text_layout(file, tell)
    else:
        layout = table_layout(file, tell, tabs=kind == "tsv")
    return StretchRows(file, layout, tell), state
