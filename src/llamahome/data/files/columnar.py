"""Parquet and Arrow files: any row by its number from one Arrow row store, memory-mapped or decoded a row group at a time.

Arrow files, which hub data sets are cached as, are mapped: nothing is decoded. A Parquet file is decoded one row group at a time; if it is
read in no order and does not fit into memory, or has large row groups, it is copied once to the cache as Arrow. Memory: the groups decoded
last, at most 128 MiB over all files of a source. The size is checked before every read, because reading a truncated map would end the
process.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llamahome.data.files.byte_ranges import digest
from llamahome.data.files.guarded_file import GuardedFile
from llamahome.data.files.index import ArrayCache, Notify
from llamahome.data.files.signatures import real_content
from llamahome.data.files.spool import copy_once
from llamahome.data.files.table_values import BadValue, canonical, holds_other_bytes, plain, row_value
from llamahome.data.records import Row, place_of
from llamahome.errors import DataError, MachineError, Problem

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_MAGIC = b"ARROW1"
_BROKEN = (pa.ArrowException, OSError)
_JUMPS = 8
"""Row groups decoded out of order before the file counts as read in no order."""
_HASHED_TOGETHER = 4096


class ArrowBatches:
    """The record batches of one Arrow file, in the file or the stream format."""

    def __init__(self, file: GuardedFile) -> None:
        self._file = file
        self._mapped: list[pa.RecordBatch] | None = None
        self._ends = list(accumulate(batch.num_rows for batch in self._batches()))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def one(self, number: int) -> pa.RecordBatch:
        """Row `number` alone."""
        self._file.check()
        index = bisect.bisect_right(self._ends, number)
        batch = self._batches()[index]
        return batch.slice(number - self._ends[index] + batch.num_rows, 1)

    def close(self) -> None:
        """Unmap the file; a later read maps it again."""
        self._mapped = None

    def _batches(self) -> list[pa.RecordBatch]:
        if self._mapped is None:
            self._file.check()
            try:
                self._mapped = self._map()
            except _BROKEN as error:
                raise DataError(_not_whole(self._file, "Arrow", _first_line(error))) from error
        return self._mapped

    def _map(self) -> list[pa.RecordBatch]:
        if self._file.size < len(_MAGIC):
            raise DataError(_not_whole(self._file, "Arrow", "it is too short"))
        source = pa.memory_map(self._file.place)
        if self._file.read(0, len(_MAGIC)) == _MAGIC:
            reader = pa.ipc.open_file(source)
            return [reader.get_batch(number) for number in range(reader.num_record_batches)]
        if self._file.read(self._file.size - len(_END_OF_STREAM), self._file.size) != _END_OF_STREAM:
            raise DataError(_not_whole(self._file, "Arrow", "it ends too early"))
        return list(pa.ipc.open_stream(source))


class DecodedGroups:
    """The row groups decoded last, over all Parquet files of a source; at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self.size = 0

    def get(self, path: str, group: int, decode: Callable[[], pa.Table]) -> pa.Table:
        """The group, decoded if necessary; the groups used longest ago make room for it."""
        key = (path, group)
        if key not in self.groups:
            self.groups[key] = decode()
            self.size += self.groups[key].nbytes
            while self.size > self.limit and len(self.groups) > 1:
                self.size -= self.groups.popitem(last=False)[1].nbytes
        self.groups.move_to_end(key)
        return self.groups[key]


class ParquetGroups:
    """The row groups of one Parquet file, or its Arrow copy."""

    def __init__(self, file: GuardedFile, decoded: DecodedGroups, notify: Notify) -> None:
        self._file, self._decoded, self._notify = file, decoded, notify
        self._copy: ArrowBatches | None = None
        self._last, self._jumps = -1, 0
        metadata = self._open().metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        sizes = [group.total_byte_size for group in groups]
        self._stays_in_place = sum(sizes) <= file.limits.decoded
        if sizes and max(sizes) > file.limits.row_group:
            self._copy = self._make_copy()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def one(self, number: int) -> pa.Table | pa.RecordBatch:
        """Row `number` alone."""
        self._file.check()
        if self._copy is None and self._jumps > _JUMPS and not self._stays_in_place:
            try:
                self._copy = self._make_copy()
            except MachineError as error:
                self._stays_in_place = True
                self._notify(f"{error.problems[0].message}; {self._file.path} is read in place, a row group for each row")
        if self._copy is not None:
            return self._copy.one(number)
        group = bisect.bisect_right(self._ends, number)
        table = self._decoded.get(self._file.path, group, lambda: self._decode(group))
        return table.slice(number - self._ends[group] + table.num_rows, 1)

    def close(self) -> None:
        """Unmap the copy; decoded groups go when others need the room."""
        if self._copy is not None:
            self._copy.close()

    def _decode(self, group: int) -> pa.Table:
        self._jumps += group not in (0, self._last + 1)
        self._last = group
        try:
            with self._open() as reader:
                return reader.read_row_group(group, use_threads=False)
        except _BROKEN as error:
            first = self._ends[group - 1] + 1 if group else 1
            message = f"rows {first:,} to {self._ends[group]:,} cannot be decoded: {_first_line(error)}"
            where = f"{self._file.path}:row {first}"
            raise DataError(Problem(code="data.bad-parquet", message=message, where=where, hint="write or copy it again")) from error

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._file.place, pre_buffer=False)
        except _BROKEN as error:
            raise DataError(_not_whole(self._file, "Parquet", _first_line(error))) from error

    def _make_copy(self) -> ArrowBatches:
        limits = self._file.limits

        def fill(sink: BinaryIO, require_room: Callable[[], None]) -> None:
            with self._open() as reader, pa.ipc.new_file(sink, reader.schema_arrow) as writer:
                for batch in reader.iter_batches(limits.copied_rows, use_threads=False):
                    writer.write_batch(batch)
                    require_room()

        place = copy_once(self._file, "as Arrow", fill, notify=self._notify, least=self._file.size)
        copy = ArrowBatches(GuardedFile(self._file.path, place=place, limits=limits))
        if len(copy) != len(self):
            raise DataError(Problem(code="data.bad-parquet", message="its row groups and its rows disagree", where=self._file.path))
        return copy


class TableRows:
    """The rows of one Parquet or Arrow file."""

    def __init__(self, file: GuardedFile, table: ArrowBatches | ParquetGroups, *, reader: str, notify: Notify) -> None:
        self._file, self._table = file, table
        self._cache = ArrayCache(file, reader, notify)
        fields = list(table.one(0).schema) if len(table) else []
        names = [field.name for field in fields]
        self.columns = tuple(names)
        self._binary = [field.name for field in fields if _may_hold_bytes(field.type)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            message, hint = f"two columns are named {repeated[0]}", "give each column a name of its own"
            raise DataError(Problem(code="data.bad-parquet", message=message, where=file.path, hint=hint))

    def __len__(self) -> int:
        return len(self._table)

    def parsed(self, number: int) -> Row | Problem:
        """Row `number`, or what is wrong with it."""
        where = place_of(self._file.path, number + 1)
        try:
            cells = self._cells(number)
            value = row_value(cells)
        except UnicodeDecodeError as error:
            message = f"a text of the row is not UTF-8: {error.reason} at byte {error.start + 1} of it"
            return Problem(code="data.not-utf8", message=message, where=where)
        except BadValue as error:
            return Problem(code="data.bad-parquet", message=str(error), where=where)
        not_text = tuple(name for name in self._binary if holds_other_bytes(cells[name]))
        return Row(index=number, source=self._file.path, line=number + 1, value=value, not_text=not_text)

    def parsed_range(self, numbers: range) -> list[Row | Problem]:
        """Consecutive rows."""
        return [self.parsed(number) for number in numbers]

    def raw(self, number: int) -> bytes:
        """The row as canonical JSON."""
        try:
            cells = self._cells(number)
        except UnicodeDecodeError:
            return f"row {number}".encode()
        try:
            return canonical(row_value(cells))
        except BadValue:
            return canonical({name: plain(value) for name, value in cells.items()})

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of BLAKE2b of each row as canonical JSON, from the cache or computed in one pass over the file."""
        return self._cache.hashes(len(self), self._digests)

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        self._table.close()
        self._file.close()

    def _digests(self) -> Iterator[bytes]:
        for begin in range(0, len(self), _HASHED_TOGETHER):
            numbers = range(begin, min(begin + _HASHED_TOGETHER, len(self)))
            yield b"".join([digest(self.raw(number)) for number in numbers])

    def _cells(self, number: int) -> dict[str, Any]:
        cells: dict[str, Any] = self._table.one(number).to_pylist()[0]
        return cells


def _may_hold_bytes(kind: pa.DataType) -> bool:
    """Whether values of this type are bytes, or hold some."""
    if "binary" in str(kind):  # binary, large_binary, fixed_size_binary and binary_view, also within lists and structs
        return True
    return pa.types.is_dictionary(kind) and _may_hold_bytes(kind.value_type)


def _not_whole(file: GuardedFile, kind: str, why: str) -> Problem:
    """The problem of a file that cannot be opened as `kind`: what it really is, or the library's reason."""
    hint: str | None = "write or copy it again"
    real = real_content(file.path, file.head())
    if real is not None and real[0] != f"it is {kind}" and (kind == "Parquet" or real[1] is not None):
        why, hint = real
    message = f"this is not a whole {kind} file: {why}"
    code = "data.bad-parquet" if kind == "Parquet" else "data.bad-arrow"
    return Problem(code=code, message=message, where=file.path, hint=hint)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
