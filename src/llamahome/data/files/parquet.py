"""Parquet files, decoded a row group at a time; those read in no order or with large groups are copied once to the cache as Arrow.

Memory: the groups decoded last, at most 128 MiB over all files of a source. Cost of a row: nothing when its group is decoded; otherwise
one group, which is why a file that does not fit into that memory is copied as soon as its rows are asked for out of order.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from llamahome.data.files.arrow import ArrowBatches
from llamahome.data.files.disguise import text_under
from llamahome.data.files.index import Tell
from llamahome.data.files.spool import copy_once
from llamahome.data.files.watch import WatchedFile
from llamahome.errors import DataError, MachineError, Problem

_DECODED = 1 << 27
_LARGEST_GROUP = 1 << 26
"""Bytes (64 MiB) of a row group, before compression, that are decoded at once."""
_JUMPS = 8
"""Row groups decoded out of order before the file is taken to be read in no order."""
_COPIED = 1024
_HEAD = 1 << 16
"""Rows in a batch of the copy."""
_BROKEN = (pa.ArrowException, OSError)


class Decoded:
    """The row groups decoded last, over all Parquet files of a source."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._size = 0

    def get(self, path: str, group: int, decode: Callable[[], pa.Table]) -> pa.Table:
        """The group, decoded if need be; the oldest make room for it."""
        key = (path, group)
        if key not in self._kept:
            self._kept[key] = decode()
            self._size += self._kept[key].nbytes
            while self._size > _DECODED and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(key)
        return self._kept[key]


class ParquetGroups:
    """The row groups of one file."""

    def __init__(self, file: WatchedFile, decoded: Decoded, tell: Tell) -> None:
        self._file, self._decoded, self._tell = file, decoded, tell
        self._copy: ArrowBatches | None = None
        self._last, self._jumps = -1, 0
        metadata = self._open().metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        sizes = [group.total_byte_size for group in groups]
        self._fits = sum(sizes) <= _DECODED
        if sizes and max(sizes) > _LARGEST_GROUP:
            self._copy = self._copied()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def one(self, number: int) -> pa.Table | pa.RecordBatch:
        """Row `number` alone."""
        if self._copy is None and self._jumps > _JUMPS and not self._fits:
            self._jumps = 0
            try:
                self._copy = self._copied()
            except MachineError as error:
                self._fits = True  # is not tried again
                self._tell(f"{error.problems[0].message}; {self._file.path} is read in place, a row group for each row")
        if self._copy is not None:
            self._file.check()
            return self._copy.one(number)
        self._file.check()
        group = bisect.bisect_right(self._ends, number)
        table = self._decoded.get(self._file.path, group, lambda: self._decode(group))
        return table.slice(number - self._ends[group] + table.num_rows, 1)

    def close(self) -> None:
        """Give the copy's map back; decoded groups go when others need the room."""
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
            where = f"{self._file.path}:row {first}"
            message = f"rows {first:,} to {self._ends[group]:,} cannot be decoded: {_reason(error)}"
            raise DataError(Problem(code="data.bad-parquet", message=message, where=where, hint="write or copy it again")) from error

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._file.place, pre_buffer=False)
        except _BROKEN as error:
            other = text_under(self._file.path, self._file.read(0, min(_HEAD, self._file.size)))
            if other is None or other[0] == "it is Parquet":
                other = _reason(error), "write or copy it again"
            message, hint = f"this is not a whole Parquet file: {other[0]}", other[1]
            raise DataError(Problem(code="data.bad-parquet", message=message, where=self._file.path, hint=hint)) from error

    def _copied(self) -> ArrowBatches:
        def fill(sink: BinaryIO, room: Callable[[], None]) -> None:
            with self._open() as reader, pa.ipc.new_file(sink, reader.schema_arrow) as writer:
                for batch in reader.iter_batches(_COPIED, use_threads=False):
                    writer.write_batch(batch)
                    room()

        place = copy_once(self._file, "as Arrow", fill, tell=self._tell, least=self._file.size)
        copied = ArrowBatches(WatchedFile(self._file.path, place=place))
        if len(copied) != len(self):
            raise DataError(Problem(code="data.bad-parquet", message="its row groups and its rows disagree", where=self._file.path))
        return copied


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
