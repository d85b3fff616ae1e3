"""Sends metrics to the trackers of monitoring.trackers, each in a process of its own (tracker_process.py). A tracker never stops a run.

A line is handed over without waiting. A tracker that ends, or takes nothing for 30 s, is reported once and left out from then on; at the
end of a run it has 30 s to send the rest. Cost of a line: one write to a pipe.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llamahome.errors import MachineError, Problem
from llamahome.monitoring.sinks import json_line

_SILENT_SECONDS = 30.0
_CLOSING_SECONDS = 30.0
_MAX_PENDING_BYTES = 4 << 20
"""Metrics that wait for a tracker: about 8,000 lines."""


def require_installed(names: Sequence[str], *, installed: Callable[[str], object] = find_spec) -> None:
    """Raise MachineError machine.no-tracker if the package of one of these trackers is missing."""
    problems = [
        Problem(
            code="machine.no-tracker",
            message=f"monitoring.trackers asks for {name}, which is not installed",
            where="monitoring.trackers",
            hint=f"pip install 'llamahome[{name}]'",
        )
        for name in names
        if installed(name) is None
    ]
    if problems:
        raise MachineError(problems)


class TrackerSink:
    """Sends the metrics of one run to one tracker. `folder` is where the tracker may write; its messages go to `log_file`."""

    def __init__(
        self,
        name: str,
        log_file: Path,
        facts: Mapping[str, Any],
        *,
        warn: Callable[[str], None],
        command: Sequence[str] = (),
        now: Callable[[], float] = time.monotonic,
        closing: float = _CLOSING_SECONDS,
    ) -> None:
        """`facts` holds run, folder and settings. `command` replaces the tracker's own process."""
        self._name, self._log_file, self._warn, self._now, self._closing = name, log_file, warn, now, closing
        self._pending: deque[bytes] = deque([json_line(facts)])
        self._moved = now()
        """When the tracker took something last, or had nothing to take."""
        self._process: subprocess.Popen[bytes] | None = None
        arguments = list(command) or [sys.executable, "-P", "-m", "llamahome.monitoring.tracker_process", name]
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    arguments, stdin=subprocess.PIPE, stdout=log, stderr=log, bufsize=0, start_new_session=True
                )  # a session of its own, because Ctrl-C must not end it before the last metrics
        except OSError as error:
            self._leave(f"cannot be started: {error.strerror or error}")
            return
        os.set_blocking(self._pipe, False)
        with contextlib.suppress(AttributeError, OSError):  # Linux: room for more lines while the package is imported
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 1 << 20)

    @property
    def _pipe(self) -> int:
        assert self._process is not None and self._process.stdin is not None
        return self._process.stdin.fileno()

    def log(self, step: int, t: float, metrics: Mapping[str, float]) -> None:
        """Hand one line over, as soon as the tracker takes it."""
        if self._process is None:
            return
        self._pending.append(json_line({"step": step, "t": t, "metrics": metrics}))
        self._hand_over()
        silent = self._now() - self._moved
        if silent > _SILENT_SECONDS or sum(map(len, self._pending)) > _MAX_PENDING_BYTES:
            self._leave(f"has taken nothing for {silent:.0f} s")

    def _hand_over(self) -> None:
        try:
            while self._pending:
                written = os.write(self._pipe, self._pending[0])
                self._moved = self._now()
                self._pending[0] = self._pending[0][written:]
                if not self._pending[0]:
                    self._pending.popleft()
            self._moved = self._now()
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._leave(f"has ended{self._last_words()}")

    def close(self) -> None:
        """Send the rest and wait until the tracker has closed its run, or for 30 s."""
        deadline = self._now() + self._closing
        while self._process is not None and self._pending and self._now() < deadline:
            self._hand_over()
            time.sleep(0.01)
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            status = self._process.wait(max(0.1, deadline - self._now()))
        except subprocess.TimeoutExpired:
            self._leave(f"did not close its run within {self._closing:g} s")
            return
        if status or self._pending:
            self._leave(f"has ended with status {status}{self._last_words()}")
        self._process = None

    def _last_words(self) -> str:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(1)  # its traceback is written before it is gone
            lines = self._log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return f": {lines[-1][:200]}" if lines else ""
        return ""

    def _leave(self, what: str) -> None:
        """Report the tracker once, end its processes, and send nothing more."""
        self._warn(f"the tracker {self._name} {what}; the training goes on without it, its messages are in {self._log_file}")
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
            self._process.wait()
        self._process = None
        self._pending.clear()
