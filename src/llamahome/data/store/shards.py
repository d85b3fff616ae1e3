"""Makes the store of a source: tokenizes shards in parallel processes, then merges them; repairs damaged shards of a store.

A preparation that was killed goes on after its last finished shard. If two processes prepare the same data, the second waits for the first
(with a lock on the folder of shards, which the system releases when the process ends) and then uses its store. Where locks do not work,
both processes write the same files.
"""

import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome import durable
from llamahome.data.files.lock import wait_for_lock
from llamahome.data.store.row_reader import ParallelReader, RowReader, read_rows
from llamahome.data.store.store import FORMAT, Store, merge, open_store, read_about, read_shard, write_shard
from llamahome.distributed.processors import usable_cpus
from llamahome.errors import MachineError, Problem
from llamahome.progress_marks import marks

_SHARD_BYTES = 1 << 21
"""Text of a shard (2 MiB): about a second of work, so that the processes finish together and a kill loses little."""
_SHARD_ROWS = 4096
_MAX_PROCESSES = 16
_BYTES_PER_PROCESS = 1 << 22
"""Text (4 MiB) for which another process saves time, because starting one takes about a second."""
_REPORT_EVERY_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MERGED = "system texts merged"
_NOT_PER_ROW = {"format", "on_bad_row", "max_bad_share", "max_lost_share", "eval_split", "eval_path", "split", "subset"}
_NOT_PER_ROW |= {"streaming", "mixture"}
"""Settings that do not change which examples a row becomes; `format` is replaced by the detected format."""
_CONVERSION_VERSION = 3
"""Raise it when the same row becomes another conversation, so that older stores are not used."""


@functools.cache
def _versions() -> list[str]:
    return [importlib.metadata.version(name) for name in ("llamahome", "tokenizers", "transformers")]


@dataclass(frozen=True)
class Task:
    """A store to be made."""

    reading: RowReader
    processed: Path
    text_bytes: float
    """Estimated size of the text."""
    max_shard_rows: int = _SHARD_ROWS
    max_processes: int | None = None
    """Processes that tokenize, with this one; None: as many as save time."""

    @property
    def stamp(self) -> str:
        """The name of the store: equal if sources, tokenizer, template, settings and versions are equal."""
        parts = {
            "format": FORMAT,
            "versions": _versions(),
            "source": self.reading.source.fingerprint,
            "understood": _CONVERSION_VERSION,
            **what_decides(self.reading),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def about(self) -> dict[str, Any]:
        """Which data the store holds, and in which state."""
        source = self.reading.source
        paths = source.paths if source.located.has_splits else self.reading.opened  # or the store of one split would replace another's
        opened = [os.path.abspath(path) for path in paths]  # noqa: PTH100 (a glob or a hub id is no path)
        return {"opened": opened, "source": source.fingerprint}

    @property
    def folder(self) -> Path:
        """The folder of the store."""
        return self.processed / self.stamp

    @property
    def shard_rows(self) -> int:
        """Rows per shard; depends on the source alone."""
        rows = len(self.reading.source)
        return min(self.max_shard_rows, max(1, int(_SHARD_BYTES * rows / max(1.0, self.text_bytes))))

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return -(-len(self.reading.source) // self.shard_rows)

    @property
    def processes(self) -> int:
        """The number of processes to start besides this one."""
        most = self.max_processes or min(usable_cpus(), _MAX_PROCESSES, int(self.text_bytes // _BYTES_PER_PROCESS))
        return max(0, min(most, self.num_shards) - 1)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        begin = shard * self.shard_rows
        return range(begin, min(begin + self.shard_rows, len(self.reading.source)))


def what_decides(reading: RowReader) -> dict[str, Any]:
    """What decides which examples a row becomes, besides the row: tokenizer, template, settings."""
    settings = reading.data.model_dump(exclude=_NOT_PER_ROW)
    merged = reading.format_name != "text" and reading.tokenizer.template.merges_system
    decides = {"tokenizer": reading.tokenizer.fingerprint, "format": reading.format_name, "settings": settings}
    return {**decides, MERGED: True} if merged else decides  # the key is left out otherwise, so that older stores stay valid


def ready_store(task: Task) -> Store | None:
    """The store, after its damaged shards were repaired; None if it does not exist or cannot be repaired."""
    store = open_store(task.folder, task.reading.source.paths, stamp=task.stamp)
    return store if store is not None and _repaired(task, store, store.damaged()) else None


def make_store(task: Task, *, say: Callable[[str], None]) -> Store:
    """The store, made now if it does not exist. Raises DataError if a file changes, MachineError if the store cannot be written."""
    once = functools.cache(say)  # a process may have to wait for several others, one after the other
    try:
        task.processed.mkdir(parents=True, exist_ok=True)
        while True:
            with _locked(task, once) as parts:
                store = ready_store(task)
                if store is not None:
                    _remove_parts(task)
                    return store
                _remove_remains(task)
                _write_shards(task, parts, say)
                merge(parts, task.folder, task.num_shards, task.reading.source.paths, stamp=task.stamp, about=task.about)
                _remove_outdated(task)
    except OSError as error:
        if error.errno in _FULL:
            _remove_parts(task)
        raise MachineError(_unwritable(task, error)) from error


def _remove_remains(task: Task) -> None:
    """Remove what an earlier process left unfinished, except its shards."""
    shutil.rmtree(task.folder, ignore_errors=True)
    durable.remove_remains(task.processed, f"{task.stamp}.*.tmp")


def _remove_outdated(task: Task) -> None:
    """Remove stores of an earlier state of the same files, which cannot be used again. A process that reads one keeps its mapping."""
    for folder in task.processed.iterdir():
        about = read_about(folder)
        if about is not None and about["opened"] == task.about["opened"] and about["source"] != task.about["source"]:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(task: Task, say: Callable[[str], None]) -> Iterator[Path]:
    """Lock the folder of shards for this process; remove it afterwards if it is empty."""
    parts = task.folder.with_name(f"{task.stamp}.parts")
    descriptor = -1
    while descriptor < 0:
        parts.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = _lock(parts, say)
    try:
        yield parts
    finally:
        with contextlib.suppress(OSError):
            if parts.stat().st_ino == os.fstat(descriptor).st_ino:
                parts.rmdir()
        os.close(descriptor)


def _lock(parts: Path, say: Callable[[str], None]) -> int:
    """A descriptor that holds the lock; -1 if the folder was removed in the meantime."""
    descriptor = os.open(parts, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process prepares the same data; waiting for it")
        wait_for_lock(descriptor, lambda: _written(parts))
    except OSError:
        return descriptor  # this disk has no locks: both processes work, and write the same
    if not parts.exists() or os.fstat(descriptor).st_ino != parts.stat().st_ino:
        os.close(descriptor)
        return -1
    return descriptor


def _written(parts: Path) -> tuple[set[str], int]:
    """What changes while another process writes shards, or merges them."""
    stamp = parts.name.removesuffix(".parts")
    sizes = 0
    for path in parts.parent.glob(f"{stamp}.*.tmp/*"):
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size
    try:
        return {path.name for path in parts.iterdir()}, sizes
    except OSError:  # the other process has removed it
        return set(), sizes


def _write_shards(task: Task, parts: Path, say: Callable[[str], None]) -> None:
    """Tokenize the shards that have no good file yet. If one fails, the others are stopped, and the finished ones stay."""
    paths, stamp = task.reading.source.paths, task.stamp
    missing = [number for number in range(task.num_shards) if read_shard(parts, number, paths, stamp=stamp) is None]
    if len(missing) < task.num_shards:
        say(f"going on with a preparation that was interrupted: {task.num_shards - len(missing)} of {task.num_shards} parts are done")
    reader = ParallelReader(task.reading, processes=max(0, min(task.processes, len(missing) - 1)), local=True)

    def write(number: int) -> None:
        table, counts = reader.read(task.rows_of(number))
        try:
            write_shard(parts, number, table, counts, stamp=stamp)
        except FileNotFoundError:  # without locks, another process may have merged the shards and removed their folder, even meanwhile
            parts.mkdir(exist_ok=True)
            write_shard(parts, number, table, counts, stamp=stamp)
        marks.advance()

    pool = ThreadPoolExecutor(reader.processes + 2, thread_name_prefix="llamahome-prepare")  # one more, to write while the others wait
    gc.freeze()  # so that the collector skips the imported libraries: a tenth of the time
    try:
        _wait([pool.submit(write, number) for number in missing], task, say)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        reader.close()
        pool.shutdown(wait=True)
        gc.unfreeze()


def _wait(futures: list["Future[None]"], task: Task, say: Callable[[str], None]) -> None:
    """Wait for all futures, or raise the first failure; report progress now and then."""
    reported = time.monotonic()
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if time.monotonic() - reported > _REPORT_EVERY_S:
            reported = time.monotonic()
            rows = len(task.reading.source)
            say(f"tokenized about {(1 - len(pending) / task.num_shards) * rows:,.0f} of {rows:,} rows")


def _repaired(task: Task, store: Store, damaged: list[int]) -> bool:
    """Tokenize these shards again and write them to the store; False if that fails."""
    try:
        return all(store.repair(number, read_rows(task.reading, task.rows_of(number))[0]) for number in damaged)
    except OSError:
        return False


def _remove_parts(task: Task) -> None:
    shutil.rmtree(task.folder.with_name(f"{task.stamp}.parts"), ignore_errors=True)


def _unwritable(task: Task, error: OSError) -> Problem:
    full = error.errno in _FULL
    return Problem(
        code="data.store-full" if full else "data.store-unwritable",
        message=f"the tokenized rows cannot be written: {error.strerror or error}" + ("; nothing of them is left" if full else ""),
        where=str(task.processed),
        hint="free room there"
        if task.reading.data.streaming is False  # the user or the objective needs all rows before training
        else "--set data.streaming=true needs no room: rows are tokenized while the model trains",
    )
