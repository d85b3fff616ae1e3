"""Writes status.json: the state of a run, its step, its process, and a heartbeat that shows that the process is alive.

A reader never sees a partial status.json, because a temporary file is written and renamed. A thread renews the heartbeat while the run
is running, because one step, evaluation or checkpoint may take longer than the time after which a reader shows the run as lost.
"""

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Literal

from llamahome import durable
from llamahome.monitoring.sinks import DiskTrouble, json_line
from llamahome.redaction import redact_values

RunState = Literal["running", "finished", "stopped", "failed"]

_HEARTBEAT_SECONDS = 5.0
LOST_AFTER_SECONDS = 30.0
"""Six heartbeats, because a busy machine may delay some of them."""


class StatusFile:
    """Writes status.json of one run, and again every `heartbeat` seconds from a thread while the state is "running"."""

    def __init__(self, path: Path, *, trouble: DiskTrouble, heartbeat: float = _HEARTBEAT_SECONDS) -> None:
        self._path = path.absolute()  # the heartbeat must find it while a reward of the user works in another folder
        self._trouble = trouble
        self._heartbeat = heartbeat
        self._record: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, state: RunState, *, step: int, horizon: int, fields: dict[str, Any]) -> None:
        """Write the state now. "running" starts the heartbeat, any other state ends it."""
        with self._lock:
            self._record = {**self._record, **redact_values(fields), "state": state, "step": step, "horizon": horizon}
            self._record |= {"pid": os.getpid(), "host": socket.gethostname()}
            self._write()
        if state != "running":
            self.close()
        elif self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._beat, name="llamahome-heartbeat", daemon=True)
            self._thread.start()

    def step(self, step: int) -> None:
        """Keep the step for the next heartbeat."""
        with self._lock:
            if self._record:
                self._record["step"] = step

    def close(self) -> None:
        """End the heartbeat; the file keeps the last state."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat):
            with self._lock:
                if self._record.get("state") == "running":
                    self._write()

    def _write(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_whole(self._path, json_line({**self._record, "t": round(time.time(), 3)}), flush=False)
            self._trouble.recovered(self._path)
        except OSError as error:
            self._trouble.failed(self._path, error)
