"""Commands whose answer a page shows: child processes that write to files without a name, which are read while they still run.

They only read data, and end with the server. A training is started by started.py, because it must outlive the server.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

_MOST_RUNNING = 4
_MOST_READ = 4 << 20
"""Bytes of an output. Rows of a book each are longer, and no page shows them whole."""
_SECONDS_TO_END = 2.0


def shown_command(words: Sequence[str]) -> str:
    """A command as it is typed."""
    return shlex.join(["llamahome", *words])


class TooManyJobs(Exception):
    """Other commands still run."""


class Job:
    """One command, from its start on."""

    def __init__(self, words: Sequence[str], *, as_json: bool = False) -> None:
        self.words = tuple(words)
        self.shown = shown_command(words)
        """As it is typed. A page reads its answer as JSON, which nobody types."""
        self.began = time.monotonic()
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llamahome", *words, *(["--json"] if as_json else [])],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,  # a Ctrl-C in the terminal is for the server
        )

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return _read(self._out)

    @property
    def err(self) -> str:
        """Its messages and errors so far."""
        return _read(self._err)

    def end(self) -> None:
        """End it if it still runs, and forget what it printed."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for file in (self._out, self._err):
            with suppress(OSError):
                file.close()


def _read(file: IO[bytes]) -> str:
    """The beginning of what a file holds, without moving the place where the child writes."""
    try:
        return os.pread(file.fileno(), _MOST_READ, 0).decode("utf-8", "replace")
    except (OSError, ValueError):  # it has been ended
        return ""


class Jobs:
    """All of them, so that there are few at a time and none after the server. Threads may share it."""

    def __init__(self, most: int = _MOST_RUNNING) -> None:
        """`most` is how many run at once."""
        self._lock, self._most = threading.Lock(), most
        self._jobs: set[Job] = set()

    def begin(self, words: Sequence[str], *, as_json: bool = False) -> Job:
        """Start a command. Raises TooManyJobs."""
        with self._lock:
            if sum(job.status is None for job in self._jobs) >= self._most:
                raise TooManyJobs
            job = Job(words, as_json=as_json)
            self._jobs.add(job)
            return job

    def end(self, job: Job) -> None:
        """End a command whose answer nobody needs any more."""
        with self._lock:
            self._jobs.discard(job)
        job.end()

    def end_all(self) -> None:
        """End all of them."""
        for job in list(self._jobs):
            self.end(job)
