"""Writes metrics as JSON lines and as TensorBoard event files; both are append-only and have one writer.

A full or missing disk never ends a training: a failed write is counted, reported once and tried again. A write that fails half-way is
truncated to the last whole record, and records that could not be written wait in memory (at most 1 MiB per file) for the next attempt,
so nothing is lost if the disk recovers. TensorBoard's files use TFRecord framing.
"""

import contextlib
import io
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llamahome import durable
from llamahome.errors import MachineError, Problem

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

_MAX_PENDING_BYTES = 2**20
"""Per file, while the disk is full: hours of metrics at one line per second."""


class Sink(Protocol):
    """A destination for metrics."""

    def log(self, step: int, t: float, metrics: Mapping[str, float]) -> None:
        """Write `metrics` of `step`, observed at unix time `t`."""

    def close(self) -> None:
        """Write the pending records and close the file."""


class DiskTrouble:
    """Counts failed writes, and warns once each time that writing begins to fail."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.failures = 0
        self.lost_bytes = 0
        self._warn = warn
        self._failing: set[Path] = set()

    def failed(self, path: Path, error: OSError) -> None:
        """Note that a write to `path` failed; warn unless one of the files is failing already."""
        self.failures += 1
        if not self._failing:
            self._warn(f"cannot write {path}: {error.strerror or error}; training goes on, metrics wait in memory and are written later")
        self._failing.add(path)

    def recovered(self, path: Path) -> None:
        """Note that a write to `path` succeeded."""
        self._failing.discard(path)

    def lost(self, path: Path, count: int) -> None:
        """Note that `count` bytes of records for `path` are dropped; warn at the first ones."""
        if self.lost_bytes == 0:
            self._warn(f"metrics for {path} could not be written and are lost; the training is not affected")
        self.lost_bytes += count


@contextmanager
def harmless(what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Warn about whatever fails in the block: it only shows a training, and must never end it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever it is, the training goes on
        warn(f"{what}: {type(error).__name__}: {error}; the training is not affected")


class AppendFile:
    """A file to which whole records are appended; opened at the first record."""

    def __init__(self, path: Path, trouble: DiskTrouble) -> None:
        self.path = path
        self._trouble = trouble
        self._descriptor: int | None = None
        self._size = 0
        self._pending: deque[bytes] = deque()

    def append(self, record: bytes) -> None:
        """Write one record now, or as soon as the disk has room."""
        self._pending.append(record)
        try:
            self._write_pending()
        except OSError as error:
            self._trouble.failed(self.path, error)
            while sum(map(len, self._pending)) > _MAX_PENDING_BYTES:
                self._trouble.lost(self.path, len(self._pending.popleft()))

    def _write_pending(self) -> None:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = _complete_size(self._descriptor) if self.path.suffix == ".jsonl" else os.fstat(self._descriptor).st_size
            os.ftruncate(self._descriptor, self._size)
        while self._pending:
            record = self._pending[0]
            try:
                written = 0
                while written < len(record):
                    written += os.write(self._descriptor, record[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)  # remove the half record
                raise
            self._size += len(record)
            self._pending.popleft()
        self._trouble.recovered(self.path)

    def close(self) -> None:
        """Try once more to write the pending records, then close."""
        try:
            if self._pending:
                self._write_pending()
        except OSError as error:
            self._trouble.failed(self.path, error)
            self._trouble.lost(self.path, sum(map(len, self._pending)))
            self._pending.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _complete_size(descriptor: int) -> int:
    """Size up to the last newline: a process that was killed in a write may have left a torn last line."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


_FINITE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str)
"""Writes what json_line writes of a flat record whose numbers are finite, in a third of the time; raises ValueError at another number."""


def json_line(record: Mapping[str, Any]) -> bytes:
    """Return one line of strict JSON; numbers that are not finite become null, because JSON has no name for them."""
    return json.dumps(without_nan(record), ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def without_nan(value: Any) -> Any:
    """`value` with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return value


class JsonlSink:
    """Writes metrics as JSON lines: {"t": unix seconds, "step": number, name: value, ...}."""

    def __init__(self, path: Path, *, trouble: DiskTrouble) -> None:
        self._file = AppendFile(path, trouble)

    def log(self, step: int, t: float, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        record = {"t": round(t, 3), "step": step, **metrics}
        try:
            line = _FINITE.encode(record).encode() + b"\n"
        except ValueError:
            line = json_line(record)
        self._file.append(line)

    def close(self) -> None:
        """Write the pending records and close the file."""
        self._file.close()


class TensorBoardSink:
    """Writes metrics as TensorBoard scalars under the same names. TensorBoard hides the records of older files from `purge_step` on."""

    def __init__(self, folder: Path, *, purge_step: int | None, trouble: DiskTrouble) -> None:
        # Imported here because it takes 0.3 s. Only the protocol buffers are imported, not the reader and its web server.
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
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.show(step, [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()], t)

    def show(self, step: int, values: Sequence["Summary.Value"], t: float | None = None) -> None:
        """Append one event, of now or of the unix time `t`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._append(Event(wall_time=t or time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Write the pending records and close the file."""
        self._file.close()


def _event_file_name(folder: Path) -> str:
    """A name that sorts after those of the other files, because TensorBoard reads the files of a folder in the order of their names."""
    prefix = "events.out.tfevents."
    stamps = [path.name.removeprefix(prefix).split(".")[0] for path in folder.glob(f"{prefix}*")]
    stamp = max([int(time.time()), *(int(text) + 1 for text in stamps if text.isdigit())])
    return f"{prefix}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"


def supersede_after(folder: Path, step: int, *, names: Sequence[str] = ("metrics.jsonl", "samples.jsonl")) -> int:
    """Move the records in the files `names` of the steps after `step` to superseded.jsonl, because a resumed run repeats those steps.

    Returns the number of moved records. Drops a torn last line. One pass over each file, constant memory. A kill is harmless at any
    point: the records are flushed to superseded.jsonl before a file without them replaces the original by a rename. If the process is
    killed in between, the next resume moves the records again: superseded.jsonl may then hold a record twice, metrics.jsonl never does.
    Raises MachineError if the folder cannot be written.
    """
    try:
        return sum(_move_records_after(step, folder / name) for name in names if (folder / name).is_file())
    except OSError as error:
        raise MachineError(
            Problem(
                code="machine.metrics-not-writable",
                message=f"cannot trim the metrics to step {step}: {error.strerror or error}",
                where=str(error.filename or folder),
                hint=f"free disk space or make {folder} writable, then run the same command again",
            )
        ) from error


def _move_records_after(step: int, path: Path) -> int:
    kept_path = path.with_name(f".{path.name}.kept")
    superseded_path = path.with_name("superseded.jsonl")
    moved, torn = 0, False
    with path.open("rb") as source, kept_path.open("wb") as kept, superseded_path.open("ab") as superseded:
        for line in source:
            if not line.endswith(b"\n"):
                torn = True
            elif _step_of(line) <= step:
                kept.write(line)
            else:
                superseded.write(json_line({**json.loads(line), "file": path.name}))
                moved += 1
        durable.flush_open(superseded, superseded_path)
        durable.flush_open(kept, kept_path)
    if moved or torn:
        durable.rename(kept_path, path)
    else:
        kept_path.unlink()
    if superseded_path.stat().st_size == 0:
        superseded_path.unlink()
    return moved


def _step_of(line: bytes) -> float:
    """The step of a record; -1 for a line without a step, which stays in its file."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return -1
    return step if isinstance(step, int | float) else -1
