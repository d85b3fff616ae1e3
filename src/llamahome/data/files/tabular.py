"""Rows of Parquet and Arrow files: one row of a table to a Row, with its hash."""

from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llamahome.data.files.cells import BadCell, canonical, plain, row_value
from llamahome.data.files.index import Shelf, Tell
from llamahome.data.files.stretches import digest
from llamahome.data.files.watch import WatchedFile
from llamahome.data.records import Row, place_of
from llamahome.errors import DataError, Problem

_TOGETHER = 4096
"""Rows hashed before their hashes are put away."""


class Table(Protocol):
    """Where single rows come from."""

    def __len__(self) -> int: ...

    def one(self, number: int) -> pa.Table | pa.RecordBatch:
        """Row `number` alone."""
        ...

    def close(self) -> None:
        """Give back what is open."""
        ...


class TableRows:
    """The rows of one Parquet or Arrow file."""

    def __init__(self, file: WatchedFile, table: Table, *, reader: str, tell: Tell) -> None:
        self._file, self._table = file, table
        self._shelf = Shelf(file, reader, tell)
        if len(table):
            names = table.one(0).schema.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                hint = "give each column a name of its own"
                message = f"two columns are named {twice[0]}"
                raise DataError(Problem(code="data.bad-parquet", message=message, where=file.path, hint=hint))

    def __len__(self) -> int:
        return len(self._table)

    def parsed(self, number: int) -> Row | Problem:
        """Row `number`, or what is wrong with it."""
        try:
            value = row_value(self._cells(number))
        except UnicodeDecodeError as error:
            message = f"a text of the row is not UTF-8: {error.reason} at byte {error.start + 1} of it"
            return Problem(code="data.not-utf8", message=message, where=place_of(self._file.path, number + 1))
        except BadCell as error:
            return Problem(code="data.bad-parquet", message=str(error), where=place_of(self._file.path, number + 1))
        return Row(index=number, source=self._file.path, line=number + 1, value=value)

    def parsed_range(self, numbers: range) -> list[Row | Problem]:
        """Rows that follow each other."""
        return [self.parsed(number) for number in numbers]

    def raw(self, number: int) -> bytes:
        """The row as JSON in one spelling."""
        try:
            cells = self._cells(number)
        except UnicodeDecodeError:
            return f"row {number}".encode()
        try:
            return canonical(row_value(cells))
        except BadCell:
            return canonical({name: plain(value) for name, value in cells.items()})

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of BLAKE2b of each row as JSON, from the cache when they are there, otherwise in one pass over the file."""
        found = self._shelf.load("hashes")
        if found is None or len(found) != len(self):
            with self._shelf.keep("hashes") as writer:
                for begin in range(0, len(self), _TOGETHER):
                    numbers = range(begin, min(begin + _TOGETHER, len(self)))
                    digests = b"".join([digest(self.raw(number)) for number in numbers])
                    writer.append(np.frombuffer(digests, ">u8").astype(np.uint64).view(np.int64))
                found = writer.finish()
        return found.view(np.uint64)

    def close(self) -> None:
        """Give back what is open."""
        self._table.close()
        self._file.close()

    def _cells(self, number: int) -> dict[str, Any]:
        cells: dict[str, Any] = self._table.one(number).to_pylist()[0]
        return cells
