"""Arrow files, mapped: the rows are where they lie, nothing is decoded. This is what hub data sets are cached as.

The size is checked before every read, so that a file cut short is refused before the map would fail.
"""

import bisect
from itertools import accumulate

import pyarrow as pa

from llamahome.data.files.disguise import text_under
from llamahome.data.files.watch import WatchedFile
from llamahome.errors import DataError, Problem

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_MAGIC = b"ARROW1"
_HEAD = 1 << 16


class ArrowBatches:
    """The record batches of one file, in the file or the stream format."""

    def __init__(self, file: WatchedFile) -> None:
        self._file = file
        self._batches: list[pa.RecordBatch] | None = None
        self._ends = list(accumulate(batch.num_rows for batch in self._opened()))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def one(self, number: int) -> pa.RecordBatch:
        """Row `number` alone."""
        self._file.check()
        which = bisect.bisect_right(self._ends, number)
        batch = self._opened()[which]
        return batch.slice(number - self._ends[which] + batch.num_rows, 1)

    def close(self) -> None:
        """Give the map back; a later read takes it again."""
        self._batches = None

    def _opened(self) -> list[pa.RecordBatch]:
        if self._batches is None:
            self._file.check()
            try:
                self._batches = self._read()
            except (pa.ArrowException, OSError) as error:
                raise DataError(self._broken(str(error).partition("\n")[0])) from error
        return self._batches

    def _read(self) -> list[pa.RecordBatch]:
        if self._file.size < len(_MAGIC):
            raise DataError(self._broken("it is too short"))
        source = pa.memory_map(self._file.place)
        if self._file.read(0, len(_MAGIC)) == _MAGIC:
            reader = pa.ipc.open_file(source)
            return [reader.get_batch(number) for number in range(reader.num_record_batches)]
        if self._file.read(self._file.size - len(_END_OF_STREAM), self._file.size) != _END_OF_STREAM:
            raise DataError(self._broken("it ends too early"))
        return list(pa.ipc.open_stream(source))

    def _broken(self, why: str) -> Problem:
        hint: str | None = "write or copy it again"
        other = text_under(self._file.path, self._file.read(0, min(_HEAD, self._file.size)))
        if other is not None and other[1] is not None and other[0] != "it is Arrow":
            why, hint = other
        return Problem(code="data.bad-arrow", message=f"this is not a whole Arrow file: {why}", where=self._file.path, hint=hint)
