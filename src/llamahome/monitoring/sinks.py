"""Where metrics are written: JSON lines and TensorBoard event files, both append-only with one writer.

Nothing here may end a training: this is the border at which a full or vanished disk is counted, told once and tried again. A write
that fails half-way is cut back to the last whole record, and what could not be written waits in memory (at most 1 MiB a file) for the
next attempt, so a disk that recovers loses nothing. Records follow TFRecord framing in TensorBoard's files.
"""

import contextlib
import io
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_MOST_WAITING = 2**20
"""Bytes that wait for a disk to recover: hours of metrics at one line a second."""


class Sink(Protocol):
    """Something that keeps metrics."""

    def log(self, step: int, t: float, metrics: Mapping[str, float]) -> None:
        """Keep `metrics` of `step`, observed at unix time `t`."""

    def close(self) -> None:
        """Write what still waits and let go of the file."""


class DiskTrouble:
    """Counts the writes that failed and tells of each spell of trouble once."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.failures = 0
        self.lost_bytes = 0
        self._warn = warn
        self._ailing: set[Path] = set()

    def failed(self, path: Path, error: OSError) -> None:
        """A write to `path` failed; only the first of a spell is told."""
        self.failures += 1
        if not self._ailing:
            self._warn(f"cannot write {path}: {error.strerror or error}; training goes on, metrics wait in memory and are written later")
        self._ailing.add(path)

    def recovered(self, path: Path) -> None:
        """A write to `path` worked."""
        self._ailing.discard(path)

    def lost(self, path: Path, count: int) -> None:
        """`count` bytes of records for `path` are given up."""
        if self.lost_bytes == 0:
            self._warn(f"metrics for {path} could not be written and are lost; the training itself is not touched")
        self.lost_bytes += count


class AppendFile:
    """A file that only grows, by whole records; opened at the first record."""

    def __init__(self, path: Path, trouble: DiskTrouble) -> None:
        self.path = path
        self._trouble = trouble
        self._descriptor: int | None = None
        self._size = 0
        self._waiting: deque[bytes] = deque()

    def append(self, record: bytes) -> None:
        """Add one record now, or as soon as the disk takes it."""
        self._waiting.append(record)
        try:
            self._write_waiting()
        except OSError as error:
            self._trouble.failed(self.path, error)
            while sum(map(len, self._waiting)) > _MOST_WAITING:
                self._trouble.lost(self.path, len(self._waiting.popleft()))

    def _write_waiting(self) -> None:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = _whole_size(self._descriptor) if self.path.suffix == ".jsonl" else os.fstat(self._descriptor).st_size
            os.ftruncate(self._descriptor, self._size)
        while self._waiting:
            record = self._waiting[0]
            try:
                done = 0
                while done < len(record):
                    done += os.write(self._descriptor, record[done:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)  # never leave half a record
                raise
            self._size += len(record)
            self._waiting.popleft()
        self._trouble.recovered(self.path)

    def close(self) -> None:
        """Try once more to write what waits, then close."""
        try:
            if self._waiting:
                self._write_waiting()
        except OSError as error:
            self._trouble.failed(self.path, error)
            self._trouble.lost(self.path, sum(map(len, self._waiting)))
            self._waiting.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _whole_size(descriptor: int) -> int:
    """Size up to the last newline: a process that died in a write leaves a torn last line, which must not glue to the next."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def json_line(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON; a number that is not finite becomes null, which every reader understands."""
    return json.dumps(_strict(record), ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _strict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return value


class JsonlSink:
    """Metrics as JSON lines: {"t": unix seconds, "step": number, name: value, ...}."""

    def __init__(self, path: Path, *, trouble: DiskTrouble) -> None:
        self._file = AppendFile(path, trouble)

    def log(self, step: int, t: float, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        self._file.append(json_line({"t": round(t, 3), "step": step, **metrics}))

    def close(self) -> None:
        """Write what still waits and close the file."""
        self._file.close()


class TensorBoardSink:
    """Metrics as scalars that TensorBoard shows under the same names; records from `purge_step` on in older files are hidden by it."""

    def __init__(self, folder: Path, *, purge_step: int | None, trouble: DiskTrouble) -> None:
        # 0.3 s, so not at the top; the protocol buffers alone, without the reader and its web server
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._file = AppendFile(folder / _event_file_name(folder), trouble)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            self._append(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _append(self, event: "Event") -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._file.append(framed.getvalue())

    def log(self, step: int, t: float, metrics: Mapping[str, float]) -> None:
        """Append one event with a scalar per metric."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._append(Event(wall_time=t, step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Write what still waits and close the file."""
        self._file.close()


def _event_file_name(folder: Path) -> str:
    """TensorBoard reads the files of a folder in the order of their names, so a new one must sort after all others."""
    prefix = "events.out.tfevents."
    stamps = [path.name.removeprefix(prefix).split(".")[0] for path in folder.glob(f"{prefix}*")]
    stamp = max([int(time.time()), *(int(text) + 1 for text in stamps if text.isdigit())])
    return f"{prefix}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
