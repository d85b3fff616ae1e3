"""Runs doctor's checks in a process of their own and watches it: a check that hangs, raises or crashes is an answer, too.

After such a check a new process does those that are left. Standard library only. Nothing is left behind: neither a process nor a file.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from llamahome.doctor.checks import Check, Request, failed, one_line, warned
from llamahome.doctor.probes import Probe

_GRACE_S = 5.0
"""For the process to start."""
_READ = 65_536


def examine(request: Request, probes: Sequence[Probe]) -> Generator[tuple[str, Check], None, None]:
    """Yield (group, check) as they are done. The folder for files of the checks is made here, and removed at the end."""
    scratch = _make_scratch()
    try:
        yield from _examine(replace(request, scratch=scratch or ""), list(probes))
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _make_scratch() -> str | None:
    """A folder for files; None if no temporary folder can be written, which a check says."""
    for parent in (None, "/tmp", "/dev/shm", "."):
        with suppress(OSError):
            return tempfile.mkdtemp(prefix="llamahome-doctor-", dir=parent)
    return None


def _examine(request: Request, left: list[Probe]) -> Iterator[tuple[str, Check]]:
    importable = True
    while left:
        with _Worker(request, left, importable) as worker:
            for probe, check in worker.answers():
                if probe.name == "imports" and check.status == "FAIL":
                    importable = False
                yield probe.group, check
            left = worker.left


class _Worker:
    """The process and what it says. `left` are the checks that a next one has to do."""

    def __init__(self, request: Request, probes: Sequence[Probe], importable: bool) -> None:
        self.left = list(probes)
        errors = Path(request.scratch) / "stderr" if request.scratch else Path(os.devnull)
        self._errors = errors.open("w+b")  # closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llamahome.doctor.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        order = json.dumps({"request": asdict(request), "names": [probe.name for probe in probes], "importable": importable})
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def answers(self) -> Iterator[tuple[Probe, Check]]:
        """What the checks found; at most one of them fails to end, and is the last."""
        assert self._process.stdout is not None
        lines = _Lines(self._process.stdout)
        current, doing = None, "before its first check"
        deadline = time.monotonic() + _GRACE_S + self.left[0].seconds
        while (message := lines.next(deadline)) is not None:
            if "begin" in message:
                current = next(probe for probe in self.left if probe.name == message["begin"])
                doing, deadline = "", time.monotonic() + current.seconds
            elif "doing" in message:
                doing = message["doing"]
            elif "check" in message and current is not None:
                yield current, Check(**message["check"])
            elif "end" in message:
                self.left.remove(current or self.left[0])
                current = None
        if self.left:
            probe = current or self.left[0]
            self.left.remove(probe)
            yield probe, self._unfinished(probe, doing, timed_out=time.monotonic() >= deadline)

    def _unfinished(self, probe: Probe, doing: str, *, timed_out: bool) -> Check:
        where = f" {doing}" if doing else ""
        if timed_out:
            make = warned if probe.slow else failed
            return make(probe.name, f"did not end within {probe.seconds:g} s{where}")
        status = self._process.wait()
        if status < 0:
            return failed(probe.name, f"the process was ended by {_signal_name(-status)}{where}")
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        last = next((line for line in reversed(text.splitlines()) if line.strip()), f"exit status {status}")
        return failed(probe.name, one_line(f"not checked{where}: {last}"))


class _Lines:
    """Lines of JSON from a pipe, with a deadline."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._pending = pipe, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def next(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None at the end of the pipe or at `deadline`."""
        while b"\n" not in self._pending:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                self._selector.close()
                return None
            piece = os.read(self._pipe.fileno(), _READ)
            if not piece:
                self._selector.close()
                return None
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def current_request(**words: Any) -> Request:
    """The request of a command, with the variables of this process that belong to llamahome or to a launcher."""
    own = {name: value for name, value in os.environ.items() if name.startswith(("LLAMAHOME_", "SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_"))}
    launcher = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"}
    return Request(environment={**own, **{name: os.environ[name] for name in launcher & set(os.environ)}}, **words)
