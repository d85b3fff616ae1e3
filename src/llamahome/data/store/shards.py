"""Makes the store of a source: shard after shard in parallel processes, then all of them in one folder; mends what is damaged.

A preparation that was killed goes on after its last finished shard. Two that run at once do each other no harm: the second waits for the
first (a lock on the folder of shards, which ends with its process) and then uses its store; where locks do not work both write the same.
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

from llamahome.data.store.reading import Reading
from llamahome.data.store.store import FORMAT, Store, merge, open_store, read_shard, told_about, write_shard
from llamahome.data.store.workers import Workers
from llamahome.distributed.processors import usable_cpus
from llamahome.errors import MachineError, Problem

_SHARD_BYTES = 1 << 21
"""Text of a shard (2 MiB): about a second of work, so that processes end together and little is lost by a kill."""
_SHARD_ROWS = 4096
_MOST_PROCESSES = 16
_WORTH_A_PROCESS = 1 << 22
"""Text (4 MiB) from which on another process is quicker than this one alone: starting one takes about a second."""
_TELL_EVERY_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MERGED = "system texts merged"
_JUDGING = {"format", "on_bad_row", "max_bad_share", "max_lost_share", "eval_split", "eval_path", "split", "subset"}
_JUDGING |= {"streaming", "mixture"}
"""Settings that do not change what becomes of a row; `format` counts as what it was found to be."""


_UNDERSTOOD = 2
"""Changes when the same row becomes another conversation, so that no store of before is taken for one of now."""


@dataclass(frozen=True)
class Task:
    """A store to be made."""

    reading: Reading
    processed: Path
    text_bytes: float
    """About how much text there is."""

    @property
    def stamp(self) -> str:
        """Names the store: equal when sources, tokenizer, template, settings and this program are."""
        told = {
            "format": FORMAT,
            "versions": [importlib.metadata.version(name) for name in ("llamahome", "tokenizers", "transformers")],
            "source": self.reading.source.fingerprint,
            "understood": _UNDERSTOOD,
            **what_decides(self.reading),
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def about(self) -> dict[str, Any]:
        """Which data it is of, and in which state."""
        typed, source = self.reading.opened, self.reading.source
        typed = source.paths if source.located.has_splits else typed  # or the store of one split would outdate that of another
        opened = [os.path.abspath(path) for path in typed]  # noqa: PTH100 (a glob or a hub id is no path)
        return {"opened": opened, "source": self.reading.source.fingerprint}

    @property
    def folder(self) -> Path:
        """Where the store lies."""
        return self.processed / self.stamp

    @property
    def shard_rows(self) -> int:
        """Rows of a shard; depends on the source alone."""
        rows = len(self.reading.source)
        return min(_SHARD_ROWS, max(1, int(_SHARD_BYTES * rows / max(1.0, self.text_bytes))))

    @property
    def num_shards(self) -> int:
        """Shards that hold all rows."""
        return -(-len(self.reading.source) // self.shard_rows)

    @property
    def processes(self) -> int:
        """How many are worth starting beside this one."""
        return max(0, min(usable_cpus(), _MOST_PROCESSES, self.num_shards, int(self.text_bytes // _WORTH_A_PROCESS)) - 1)


def what_decides(reading: Reading) -> dict[str, Any]:
    """What decides about the examples of a row besides the row: tokenizer, template, settings."""
    settings = reading.data.model_dump(exclude=_JUDGING)
    merged = reading.format_name != "text" and reading.tokenizer.template.merges_system
    told = {"tokenizer": reading.tokenizer.fingerprint, "format": reading.format_name, "settings": settings}
    return {**told, MERGED: True} if merged else told  # a new key only where it matters: what lies there stays right


def ready_store(task: Task) -> Store | None:
    """The store when it is there and whole, after damaged shards were mended; None otherwise."""
    store = open_store(task.folder, task.reading.source.paths, stamp=task.stamp)
    return store if store is not None and _mended(task, store, store.damaged()) else None


def make_store(task: Task, *, say: Callable[[str], None]) -> Store:
    """The store, made now unless it is there. Raises DataError when a file changes, MachineError when it cannot be written."""
    once = functools.cache(say)  # who waits may have to wait for several, one after the other
    try:
        task.processed.mkdir(parents=True, exist_ok=True)
        while True:
            with _locked(task, once) as parts:
                store = ready_store(task)
                if store is not None:
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
    """Remove what an earlier process left half made, but not its shards."""
    shutil.rmtree(task.folder, ignore_errors=True)
    for remains in task.processed.glob(f"{task.stamp}.*.tmp"):
        if not _lives(remains.name.split(".")[1]):
            shutil.rmtree(remains, ignore_errors=True)


def _remove_outdated(task: Task) -> None:
    """Remove stores of an earlier state of the same files, which nothing can ask for again. Who reads one keeps what it has mapped."""
    for folder in task.processed.iterdir():
        about = told_about(folder)
        if about is not None and about["opened"] == task.about["opened"] and about["source"] != task.about["source"]:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(task: Task, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder of shards, for this process alone; gone afterwards when nothing is left in it."""
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
    """A descriptor that holds the lock; -1 when the folder was removed in the meantime."""
    descriptor = os.open(parts, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process prepares the same data; waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return descriptor  # no locks on this disk: both work, and write the same
    if not parts.exists() or os.fstat(descriptor).st_ino != parts.stat().st_ino:
        os.close(descriptor)
        return -1
    return descriptor


def _write_shards(task: Task, parts: Path, say: Callable[[str], None]) -> None:
    """Tokenize what no good shard holds yet. When one fails the others are stopped, and what is finished stays."""
    paths, stamp = task.reading.source.paths, task.stamp
    missing = [number for number in range(task.num_shards) if read_shard(parts, number, paths, stamp=stamp) is None]
    if len(missing) < task.num_shards:
        say(f"going on with a preparation that was interrupted: {task.num_shards - len(missing)} of {task.num_shards} parts are done")
    workers = Workers(task.reading, processes=max(0, min(task.processes, len(missing) - 1)), niceness=0, here=True)
    pool = ThreadPoolExecutor(workers.processes + 2, thread_name_prefix="llamahome-prepare")  # one more, to write while the others wait
    gc.freeze()  # or the collector walks through every imported library again and again: a tenth of the time
    try:
        _watch([pool.submit(_write_one, task, parts, number, workers) for number in missing], task, say)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        workers.close()
        pool.shutdown(wait=True)
        gc.unfreeze()


def _write_one(task: Task, parts: Path, number: int, workers: Workers) -> None:
    begin = number * task.shard_rows
    rows = range(begin, min(begin + task.shard_rows, len(task.reading.source)))
    table, counts = workers.read(rows)
    write_shard(parts, number, table, counts, stamp=task.stamp)


def _watch(work: list["Future[None]"], task: Task, say: Callable[[str], None]) -> None:
    """Wait for all or the first failure, which is raised; say now and then how far it is."""
    told = time.monotonic()
    pending = set(work)
    while pending:
        done, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
        for each in done:
            each.result()
        if time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            rows = len(task.reading.source)
            say(f"tokenized about {(1 - len(pending) / task.num_shards) * rows:,.0f} of {rows:,} rows")


def _mended(task: Task, store: Store, damaged: list[int]) -> bool:
    """Tokenize these shards again and put them where they were; False when that cannot be done."""
    workers = Workers(task.reading, processes=0, niceness=0, here=True)
    for number in damaged:
        begin = number * task.shard_rows
        table, _ = workers.read(range(begin, min(begin + task.shard_rows, len(task.reading.source))))
        try:
            if not store.mend(number, table):
                return False
        except OSError:
            return False
    return True


def _remove_parts(task: Task) -> None:
    shutil.rmtree(task.folder.with_name(f"{task.stamp}.parts"), ignore_errors=True)


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _unwritable(task: Task, error: OSError) -> Problem:
    full = error.errno in _FULL
    return Problem(
        code="data.store-full" if full else "data.store-unwritable",
        message=f"the tokenized rows cannot be written: {error.strerror or error}" + ("; nothing of them is left" if full else ""),
        where=str(task.processed),
        hint="--set data.streaming=true needs no room: rows are tokenized while the model trains",
    )
