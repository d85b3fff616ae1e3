"""Processes that tokenize rows: started, asked and ended here; worker.py is what runs in them.

A worker is an ordinary child with two pipes, no shared memory and no port. Its terminal signals are its parent's business: it sits in a
process group of its own. One that dies takes the run down with the names of the rows it worked on. Memory: about 100 MB each.
"""

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

from llamahome.data.records import Row
from llamahome.data.store.counts import Counts
from llamahome.data.store.messages import FAILED, PROBLEMS, READY, ROWS, receive, send
from llamahome.data.store.packed import Damaged, unpack
from llamahome.data.store.reading import Reading, read_rows
from llamahome.data.store.table import ExampleTable
from llamahome.errors import DataError, LlamaHomeError, MachineError, Problem

_PATIENCE_S = 5.0
"""How long a worker whose pipe was closed may take to end."""
_SHOWN_ROWS = 3
_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""One thread in each: the processes are what runs in parallel."""


class _Differs(Exception):
    """The worker could not build the same tokenizer from its description."""


class Workers:
    """So many processes for one source and tokenizer; any thread may call `read`. Close it.

    Where a tokenizer cannot be rebuilt in another process (it is compared by fingerprint), this process does the work, one call at a time.
    """

    def __init__(self, reading: Reading, *, processes: int, niceness: int, here: bool) -> None:
        """Start them, giving way to others by `niceness`; with `here` this process works beside them, one call at a time."""
        self.processes = processes
        self._reading = reading
        self._free: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._all: list[_Worker] = []
        self._here = threading.Lock()
        try:
            for _ in range(processes):
                self._all.append(_Worker(_description(reading), niceness))
        except OSError as error:
            self.close()
            message = f"cannot start a process that tokenizes: {error.strerror}"
            raise MachineError(
                Problem(code="data.worker-failed", message=message, hint="free some memory, or allow more processes")
            ) from error
        for worker in self._all:
            self._free.put(worker)
        if here or not self._all:
            self._free.put(None)

    def read(self, numbers: Sequence[int]) -> tuple[ExampleTable, Counts]:
        """The examples and counts of these rows; raises the DataError of a source that changed, MachineError when a worker dies."""
        worker = self._free.get()
        try:
            if worker is not None:
                with contextlib.suppress(_Differs):
                    return worker.read(self._reading, numbers)
            with self._here:
                return read_rows(self._reading, numbers)
        finally:
            self._free.put(worker)

    def pids(self) -> list[int]:
        """Ids of the processes that were started."""
        return [worker.pid for worker in self._all]

    def close(self) -> None:
        """End the processes; may be called twice. A call of `read` that still waits fails."""
        for worker in self._all:
            worker.hang_up()
        for worker in self._all:
            worker.close()
        self._all = []


class _Worker:
    """One process."""

    def __init__(self, description: bytes, niceness: int) -> None:
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._differs = self._ready = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "llamahome.data.store.worker", str(os.getpid()), str(niceness)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, **_VARIABLES},
                process_group=0,
            )
        except OSError:
            self._complaints.close()
            raise
        self.pid = self._process.pid
        self._post = threading.Thread(target=self._send, args=(description,), daemon=True)
        self._post.start()  # a description may be larger than a pipe, and nobody reads it yet

    def read(self, reading: Reading, numbers: Sequence[int]) -> tuple[ExampleTable, Counts]:
        """Ask for rows and wait for the answer."""
        self._greet(reading)
        if self._differs:
            raise _Differs
        self._send(json.dumps(list(map(int, numbers))).encode())
        answer = self._receive(reading, numbers)
        if answer[:1] != ROWS:
            raise self._told(answer, reading, numbers)
        try:
            return unpack(answer[1:], reading.source.paths)
        except Damaged as damaged:
            raise MachineError(_failed(f"a process that tokenizes answered garbage ({damaged})", reading, numbers)) from damaged

    def hang_up(self) -> None:
        """Tell it that there is nothing more to do."""
        if self._process.stdin is not None and not self._post.is_alive():
            try:
                self._process.stdin.close()
            except OSError:
                self._process.kill()
        else:
            self._process.kill()

    def close(self) -> None:
        """Wait for its end; make it end when it takes too long."""
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._post.join()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue

    def _greet(self, reading: Reading) -> None:
        if self._ready:
            return
        answer = self._receive(reading, [])
        if answer[:1] != READY:
            raise self._told(answer, reading, [])
        tokenizer, source = answer[1:].decode().split()
        self._differs = tokenizer != reading.tokenizer.fingerprint
        if source != reading.source.fingerprint:
            hint = "run again when nothing writes to it"
            where = reading.source.paths[0]
            raise DataError(Problem(code="data.file-changed", message="a file was changed while it was read", where=where, hint=hint))
        self._ready = True

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, message)
        except (OSError, ValueError):
            return  # it is gone; the answer that does not come tells why

    def _receive(self, reading: Reading, numbers: Sequence[int]) -> bytes:
        assert self._process.stdout is not None
        answer = receive(self._process.stdout)
        if answer is not None:
            return answer
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._complaints.seek(0)
        said = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
        message = f"a process that tokenizes {how}" + (f": {said[-1]}" if said and status > 0 else "")
        raise MachineError(_failed(message, reading, numbers))

    def _told(self, answer: bytes, reading: Reading, numbers: Sequence[int]) -> LlamaHomeError:
        content = json.loads(answer[1:])
        if answer[:1] == PROBLEMS:
            kind = {each.__name__: each for each in LlamaHomeError.__subclasses__()}.get(content[0], LlamaHomeError)
            return kind([Problem(**problem) for problem in content[1]])
        assert answer[:1] == FAILED
        row, line = content
        return MachineError(_failed(f"a process that tokenizes failed: {line}", reading, numbers if row is None else [row]))


def _description(reading: Reading) -> bytes:
    told = {
        "tokenizer": reading.tokenizer.describe(),
        "system_role": reading.tokenizer.system_role,
        "opened": reading.source.paths,  # and not what was typed: which split of it is read was decided
        "data": reading.data.model_dump(),
        "format": reading.format_name,
    }
    return json.dumps(told).encode()


def _failed(message: str, reading: Reading, numbers: Sequence[int]) -> Problem:
    """What happened, with the rows that were being worked on."""
    if not len(numbers):
        hint = "free some memory: each process that tokenizes takes about 150 MB"
        return Problem(code="data.worker-failed", message=f"{message}, before it read a row", hint=hint)
    places = [reading.source.parsed(int(number)) for number in numbers[:_SHOWN_ROWS]]
    where = [place.where or "" for place in places]
    more = f" and {len(numbers) - len(where):,} more" if len(numbers) > len(where) else ""
    others = f", while it worked on {', '.join(where)}{more}" if len(numbers) > 1 else ""
    first = places[0]
    shown = f"llamahome data show {shlex.quote(first.source)} --row {first.index}" if isinstance(first, Row) else None
    return Problem(code="data.worker-failed", message=message + others, where=where[0], hint=shown)
