"""A pool of processes that work on rows for this process.

A worker is a child with one socket to its parent: no port, no shared memory, no torch. It runs in a process group of its own, so that
Ctrl-C reaches only the parent, and it ends when the parent ends, however that happens. Messages are pickled by multiprocessing; both
ends are this program. The pools of multiprocessing itself run the user's main script again in every process, leave the processes running
when the parent is killed, and do not say which rows a lost process was working on. Memory: about 100 MB per worker.
"""

import contextlib
import gc
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Generic, TypeVar

from llamahome.errors import LlamaHomeError, MachineError, Problem

_MAIN = "import sys; from llamahome.data.store.workers import serve; serve(*map(int, sys.argv[1:]))"
_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""One thread per worker, because the workers are what runs in parallel."""
_POLL_S = 1.0
"""How often a worker checks that its parent is alive."""

Result = TypeVar("Result")
Work = Callable[[Sequence[int]], Result]


class WorkerFailed(Exception):
    """A worker ended or hit a defect while it worked on `rows`, which are empty if it was not ready yet."""

    def __init__(self, reason: str, rows: Sequence[int]) -> None:
        super().__init__(reason, rows)
        self.reason, self.rows = reason, rows


class CannotOpen(Exception):
    """What a worker opened is not equal to what its parent has."""


class WorkerPool(Generic[Result]):
    """Processes that each call `open_work(*arguments)` once and then answer requests with the function it returned. Close it.

    With `local`, this process works beside them with that function, in the thread that asks.
    """

    def __init__(
        self,
        open_work: Callable[..., Callable[[Any], Result]],
        *arguments: Any,
        processes: int,
        niceness: int = 0,
        local: Work[Result] | None = None,
    ) -> None:
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[Work[Result]] = queue.SimpleQueue()
        try:
            for _ in range(processes):
                self._workers.append(_Worker((open_work, arguments), niceness))
        except OSError as error:
            self.close()
            message = f"cannot start a process that reads rows: {error.strerror}"
            hint = "free some memory, or allow more processes"
            raise MachineError(Problem(code="data.worker-failed", message=message, hint=hint)) from error
        for worker in self._workers:
            self._idle.put(worker)
        if local is not None:
            self._idle.put(local)

    def __call__(self, rows: Sequence[int]) -> Result:
        """The result for these rows; waits for an idle worker. Any thread may call it.

        Raises WorkerFailed, CannotOpen, or the LlamaHomeError that the worker raised.
        """
        work = self._idle.get()
        try:
            return work(rows)
        finally:
            self._idle.put(work)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the processes; may be called twice. Calls that still wait for a process fail."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, opening: tuple[Callable[..., Any], tuple[Any, ...]], niceness: int) -> None:
        self._opening = opening
        self._opened = False
        self._connection, child = Pipe()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process runs)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, str(child.fileno()), str(os.getpid()), str(niceness)],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                env={**os.environ, **_VARIABLES},
                pass_fds=[child.fileno()],
                process_group=0,
            )
        except OSError:
            self._connection.close()
            self._stderr.close()
            raise
        finally:
            child.close()

    def __call__(self, rows: Sequence[int]) -> Any:
        """Send a request and wait for the answer."""
        if not self._opened:  # here, because it blocks until the process reads it
            self._ask(self._opening, ())
            self._opened = True
        return self._ask(rows, rows)

    def close(self) -> None:
        """Wait until the process, which was killed, has ended."""
        self.process.wait()
        self._connection.close()
        self._stderr.close()

    def _ask(self, request: Any, rows: Sequence[int]) -> Any:
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerFailed(self._exit_reason(), rows) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _exit_reason(self) -> str:
        status = self.process.wait()
        if status < 0:
            return f"was killed by signal {-status}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f"ended with status {status}" + (f": {lines[-1]}" if lines else "")


def serve(descriptor: int, parent: int, niceness: int) -> None:
    """The main function of a worker: answer requests until the parent closes the connection."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(niceness)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    connection, work = Connection(descriptor), None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = connection.recv()
            try:
                if work is None:
                    open_work, arguments = request
                    work, answer = open_work(*arguments), None
                    gc.freeze()  # so that the collector skips the imported libraries: a tenth of the time
                else:
                    answer = call(work, request)
            except (LlamaHomeError, CannotOpen) as error:
                answer = error
            except BaseException as error:
                line = traceback.format_exception_only(error)[-1].strip()
                connection.send(WorkerFailed(f"failed: {line}", getattr(error, "rows", ())))
                raise
            connection.send(answer)


def call(work: Work[Result], rows: Sequence[int]) -> Result:
    """work(rows); an error that is a defect gets an attribute `rows`: the single row that raises it, or else all of them."""
    try:
        return work(rows)
    except LlamaHomeError:
        raise
    except BaseException as error:
        if len(rows) > 1:
            for at in range(len(rows)):
                call(work, rows[at : at + 1])
        error.rows = rows  # type: ignore[attr-defined]
        raise


def _exit_with(parent: int) -> None:
    """End this process as soon as the parent has ended, even if a fork of the parent keeps the connection open."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(0)
