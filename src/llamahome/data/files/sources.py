"""Any row by its number, over one or many files of any kind, without reading the files whole.

Every kind of file has a reader with the same methods (FileRows); a Source is the files one after the other. Cost: one pass over each
file to find where its rows begin, cached under data/training/processed/index; afterwards a row is one read and one parse.
"""

import bisect
import hashlib
import os
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.byte_ranges import ByteRangeRows
from llamahome.data.files.columnar import ArrowBatches, DecodedGroups, ParquetGroups, TableRows
from llamahome.data.files.delimited import table_layout
from llamahome.data.files.guarded_file import LIMITS, GuardedFile, ReaderLimits
from llamahome.data.files.index import Notify
from llamahome.data.files.json_files import array_layout, lines_layout
from llamahome.data.files.kinds import ending, kind_of
from llamahome.data.files.locate import Located, locate
from llamahome.data.files.plaintext import text_layout
from llamahome.data.files.splits import TO_TRAIN, Wanted
from llamahome.data.files.spool import PACKED, unpacked
from llamahome.data.records import Row
from llamahome.errors import DataError, Problem

_VERSION = 1
"""Of the rows that the readers make of the same bytes; part of the fingerprint."""


FileRows = ByteRangeRows | TableRows
"""The rows of one file, whatever its kind."""


class Source:
    """The rows of one or more files, in the order of the files and of their rows. May be read from several threads."""

    def __init__(
        self,
        paths: tuple[str, ...],
        *,
        located: Located | None = None,
        say: Callable[[str], None] | None = None,
        limits: ReaderLimits = LIMITS,
    ) -> None:
        self.paths = paths
        self.located = located or Located(paths)
        """What else is there: data files that are not read, rows to evaluate on, splits that are left alone."""
        self.notes: list[str] = []
        """What people should know about how the files are read; `say` received each at once."""
        self._say, self._limits = say, limits
        self._lock = threading.RLock()
        self._open: OrderedDict[int, FileRows] = OrderedDict()
        self._files: list[FileRows] = []
        digest = hashlib.blake2b(digest_size=16)
        problems: list[Problem] = []
        decoded = DecodedGroups(limits.decoded)
        for path in paths:
            try:
                rows, state = _open_file(path, self.tell, decoded, limits)
            except DataError as error:
                problems += error.problems
                continue
            digest.update(f"{os.path.relpath(path)}\0{state}\0".encode("utf-8", "surrogateescape"))
            self._files.append(rows)
            self._use(len(self._files) - 1)
        if problems:
            raise DataError(problems)
        self.fingerprint = digest.hexdigest()
        """Of names, sizes, times and readers; equal if the same rows come in the same order."""
        self._ends = list(accumulate(map(len, self._files)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row | Problem]:
        return (self.parsed(number) for number in range(len(self)))

    def row(self, number: int) -> Row:
        """Row `number`, counted over all files; raises DataError if it is not a JSON object."""
        row = self.parsed(number)
        if isinstance(row, Problem):
            raise DataError(row)
        return row

    def parsed(self, number: int) -> Row | Problem:
        """Row `number`, or what is wrong with it; raises DataError if its file changed."""
        with self._lock:
            file, inside = self._find(number)
            return file.parsed(inside)

    def parsed_range(self, numbers: range) -> list[Row | Problem]:
        """`parsed` of consecutive rows, at a third of the cost because they are read together."""
        rows: list[Row | Problem] = []
        while len(rows) < len(numbers):
            with self._lock:
                file, inside = self._find(numbers.start + len(rows))
                rows += file.parsed_range(range(inside, min(len(file), inside + len(numbers) - len(rows))))
        return rows

    def raw(self, number: int) -> bytes:
        """The bytes of row `number` as they are in the file (a line without its end); canonical JSON for Parquet and Arrow."""
        with self._lock:
            file, inside = self._find(number)
            return file.raw(inside)

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of BLAKE2b of each row's content: equal rows of one kind of file have equal hashes."""
        hashes = []
        for number, file in enumerate(self._files):
            with self._lock:
                self._use(number)
                hashes.append(file.hashes())
        return hashes[0] if len(hashes) == 1 else np.concatenate([np.empty(0, np.uint64), *hashes])

    def file_of(self, number: int) -> int:
        """Which of `paths` holds row `number`."""
        return bisect.bisect_right(self._ends, number)

    def beginnings(self, *, files: int, rows: int) -> list[list[Row]]:
        """The first rows of each of the first files, at most so many; what is no JSON object is left out.

        Of Parquet and Arrow files with equal columns only the first is read, because reading a row may decode many.
        """
        columns: set[tuple[str, ...]] = set()
        found = []
        for file, (begin, end) in islice(zip(self._files, pairwise((0, *self._ends)), strict=True), files):
            if isinstance(file, TableRows):
                if file.columns in columns:
                    continue
                columns.add(file.columns)
            parsed = self.parsed_range(range(begin, min(begin + rows, end)))
            found.append([row for row in parsed if isinstance(row, Row)])
        return found

    @property
    def ignored(self) -> tuple[str, ...]:
        """Data files among the paths that are not read."""
        return self.located.ignored

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def tell(self, note: str) -> None:
        """Pass a sentence on to people, once."""
        if note not in self.notes:
            self.notes.append(note)
            if self._say is not None:
                self._say(note)

    def _find(self, number: int) -> tuple[FileRows, int]:
        """The file that holds row `number`, and the row's number within it."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        index = self.file_of(number)
        self._use(index)
        file = self._files[index]
        return file, number - self._ends[index] + len(file)

    def _use(self, index: int) -> None:
        """Mark the file as used last; the file used longest ago is closed if too many are open."""
        self._open[index] = self._files[index]
        self._open.move_to_end(index)
        if len(self._open) > self._limits.open_files:
            self._open.popitem(last=False)[1].close()


def open_source(
    path: str | Sequence[str],
    *,
    say: Callable[[str], None] | None = None,
    wanted: Wanted = TO_TRAIN,
    limits: ReaderLimits = LIMITS,
) -> Source:
    """Index the files, folders, globs or hub data sets that `path` names; `say` takes sentences for people, `wanted` chooses a split.

    Raises DataError if there is nothing to read, or if a file is not what its name says.
    """
    notes: list[str] = []
    located = locate(path, say=notes.append, wanted=wanted)
    source = Source(located.files, located=located, say=say, limits=limits)
    for note in notes:
        source.tell(note)
    if len(source) == 0:
        raise DataError(_no_rows(path if isinstance(path, str) else ", ".join(path), located.files))
    return source


def _no_rows(typed: str, files: Sequence[str]) -> Problem:
    if len(files) > 1:
        hint = "write rows into them, one JSON object a line"
        return Problem(code="data.empty-folder", message=f"{len(files)} files hold no rows", where=typed, hint=hint)
    (path,) = files
    hint = "write rows into it, or remove it"
    if ending(path) in (".jsonl", ".ndjson"):
        hint = f"llamahome data sample {shlex.quote(path)} --force   fills it with rows to begin with"
    return Problem(code="data.empty-file", message="the file holds no rows", where=path, hint=hint)


def _open_file(path: str, notify: Notify, decoded: DecodedGroups, limits: ReaderLimits) -> tuple[FileRows, str]:
    """The file's rows, and what distinguishes this state of it from another."""
    packed = Path(path).suffix.lower() in PACKED
    file = unpacked(path, notify, limits) if packed else GuardedFile(path, limits=limits)
    kind = kind_of(file)
    state = f"{_VERSION} {kind} {file.origin.size} {file.origin.modified_ns} {file.origin.changed_ns}"
    if kind == "parquet":
        return TableRows(file, ParquetGroups(file, decoded, notify), reader=kind, notify=notify), state
    if kind == "arrow":
        return TableRows(file, ArrowBatches(file), reader=kind, notify=notify), state
    if kind == "jsonl":
        layout = lines_layout(file)
    elif kind == "array":
        layout = array_layout(file)
    elif kind == "text":
        layout = text_layout(file, notify)
    else:
        layout = table_layout(file, notify, tabs=kind == "tsv")
    return ByteRangeRows(file, layout, notify), state
