"""The file that says how a run is doing now: state, step, process, and a heartbeat that shows that the process lives.

status.json is always whole: it is written beside and renamed. A thread renews the heartbeat while the run is running, because one
step, evaluation or checkpoint may take longer than a reader waits before it calls the run lost.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from llamahome.monitoring.sinks import DiskTrouble, json_line

RunState = Literal["running", "finished", "stopped", "failed"]

HEARTBEAT_SECONDS = 5.0
LOST_AFTER_SECONDS = 30.0
"""Six heartbeats: a busy machine may delay some of them."""


class StatusFile:
    """Writes status.json of one run, and renews it from a thread while the state is "running"."""

    def __init__(self, path: Path, *, trouble: DiskTrouble) -> None:
        self._path = path
        self._trouble = trouble
        self._record: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, state: RunState, *, step: int, horizon: int, fields: dict[str, Any]) -> None:
        """Write the state now; any state but "running" ends the heartbeat."""
        with self._lock:
            self._record = {**self._record, **fields, "state": state, "step": step, "horizon": horizon}
            self._record |= {"pid": os.getpid(), "host": socket.gethostname()}
            self._write()
        if state != "running":
            self._end_heartbeat()
        elif self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._beat, name="llamahome-heartbeat", daemon=True)
            self._thread.start()

    def step(self, step: int) -> None:
        """Remember the step for the next heartbeat."""
        with self._lock:
            if self._record:
                self._record["step"] = step

    def close(self) -> None:
        """End the heartbeat; the file keeps its last state."""
        self._end_heartbeat()

    def _end_heartbeat(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with self._lock:
                if self._record.get("state") == "running":
                    self._write()

    def _write(self) -> None:
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(json_line({**self._record, "t": round(time.time(), 3)}))
            fresh.replace(self._path)
            self._trouble.recovered(self._path)
        except OSError as error:
            with suppress(OSError):
                fresh.unlink()
            self._trouble.failed(self._path, error)


def read_status(path: Path) -> dict[str, Any]:
    """The newest status, or an empty dictionary when there is none that can be read."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
