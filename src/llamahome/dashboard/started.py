"""Trainings that were started from the page: their processes, what they print, which run each became, and how one is asked to stop.

A training is a process of its own session whose output goes to a file, so it does not notice when the server ends. What the server knows
of it is in data/metrics/started/<name>.json, so another server goes on from there. A signal is sent only to the process that was started:
its number, its time of birth and its command line are compared, and the run's status must name it or a process that it started.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llamahome import durable
from llamahome.dashboard.jobs import shown_command
from llamahome.monitoring.processes import ProcessId, belongs_to, identify, is_alive, is_python_module
from llamahome.monitoring.readings import whole
from llamahome.redaction import redact_words
from llamahome.rundir import STARTED, RunPaths

_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
_MOST_READ = 256 << 10
"""Bytes of the end of what a training printed."""
_MOST_LISTED = 200
_MOST_WAITED_S = 1.0
_MODULE = "llamahome"


class RefusedStart(Exception):
    """Why no training is started or stopped."""


@dataclass(frozen=True)
class Record:
    """One training that was started from the page."""

    name: str
    words: tuple[str, ...]
    """What is typed after `llamahome`, without secrets."""
    host: str
    process: ProcessId
    time: float
    """Unix seconds."""
    run: str | None = None
    """The id of its run; None until the run is known."""
    asked_to_stop: bool = False

    @property
    def shown(self) -> str:
        """The command as it is typed."""
        return shown_command(self.words)


class StartedTrainings:
    """Starts trainings, finds their runs, and asks them to stop. Threads may share it."""

    def __init__(self, folder: Path = STARTED) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._asked: set[str] = set()
        """Names of those that this server has asked to stop."""

    def start(self, words: Sequence[str], *, run: str | None = None) -> Record:
        """Start `llamahome <words>`; `run` is the run that it resumes. Raises RefusedStart while another one that was started here runs."""
        with self._lock:
            running = next((record for record in self.records() if self.is_alive(record)), None)
            if running is not None:
                raise RefusedStart(
                    f"{running.shown} still runs, and this machine trains one model at a time. Stop it first, or type the command."
                )
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
            try:
                return self._begin(name, words, run)
            except OSError as error:  # nobody could stop it from the page
                if (child := self._children.pop(name, None)) is not None:
                    child.kill()
                    child.wait()
                why = error.strerror or error
                raise RefusedStart(f"Nothing was started, because {self._folder} cannot be written: {why}") from error

    def _begin(self, name: str, words: Sequence[str], run: str | None) -> Record:
        self._folder.mkdir(parents=True, exist_ok=True)
        began = time.time()
        with self.log(name).open("xb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", _MODULE, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[name] = child
        process = identify(child.pid) or ProcessId(child.pid, began)
        while not is_python_module(process, _MODULE) and child.poll() is None and time.time() < began + _MOST_WAITED_S:
            time.sleep(0.001)  # for a moment a new process has no command line yet, by which `stop` knows it
        record = Record(name, tuple(redact_words(words)), socket.gethostname(), process, began, run)
        self._write(record)
        return record

    def stop(self, name: str, paths: RunPaths | None) -> None:
        """Ask the training to save a checkpoint and end; `paths` is its run if there is one. Raises RefusedStart.

        Only once, because a second SIGTERM makes a run leave without saving.
        """
        with self._lock:
            record = self.find(name)
            if record is None or not self.is_alive(record) or not is_python_module(record.process, _MODULE):
                raise RefusedStart("The process that was started from this page has ended.")
            if record.asked_to_stop:
                raise RefusedStart("It has been asked to stop already; it ends when the checkpoint is saved.")
            if paths is not None and not writes(record, paths):
                raise RefusedStart("The run has another process than the one that was started from this page.")
            self._asked.add(name)
            with suppress(OSError):  # a full disk is a reason to stop a training
                self._write(replace(record, asked_to_stop=True))
            os.kill(record.process.pid, signal.SIGTERM)

    def records(self) -> list[Record]:
        """The newest of them, the newest first."""
        for child in list(self._children.values()):
            child.poll()  # one that has ended stays in the list of processes until somebody asks
        names = sorted((path.stem for path in self._folder.glob("*.json") if _NAME.fullmatch(path.stem)), reverse=True)
        return [record for name in names[:_MOST_LISTED] if (record := self.find(name)) is not None]

    def find(self, name: str) -> Record | None:
        """The training of this name."""
        if not _NAME.fullmatch(name):
            return None
        try:
            content = json.loads((self._folder / f"{name}.json").read_bytes())
            record = Record(**{**content, "words": tuple(content["words"]), "process": ProcessId(**content["process"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if not all(isinstance(word, str) for word in record.words) or whole(record.process.pid) is None:
            return None
        return replace(record, asked_to_stop=True) if name in self._asked else record

    def is_alive(self, record: Record) -> bool:
        """Whether the process of a training runs here."""
        child = self._children.get(record.name)
        if child is not None:  # its first thread may have ended before the others
            return child.poll() is None
        return record.host == socket.gethostname() and is_alive(record.process)

    def of_run(self, run_id: str) -> Record | None:
        """The newest training that made or resumed this run."""
        return next((record for record in self.records() if record.run == run_id), None)

    def with_run(self, record: Record, runs: Sequence[RunPaths]) -> Record:
        """The record with its run, if that is among `runs` by now."""
        if record.run is not None:
            return record
        found = next((paths for paths in runs if writes(record, paths)), None)
        if found is None:
            return record
        with self._lock:
            known = replace(self.find(record.name) or record, run=found.run_id)
            with suppress(OSError):  # it is found again
                self._write(known)
        return known

    def printed(self, name: str) -> str:
        """The end of what a training printed; the name is that of a record."""
        try:
            with self.log(name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST_READ))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def status(self, name: str) -> int | None:
        """The exit status of a training that this server started and that has ended."""
        child = self._children.get(name)
        return None if child is None else child.poll()

    def log(self, name: str) -> Path:
        """Where a training prints to."""
        return self._folder / f"{name}.log"

    def _write(self, record: Record) -> None:
        durable.write_whole(self._folder / f"{record.name}.json", json.dumps(asdict(record)) + "\n", flush=False)


def writes(record: Record, paths: RunPaths) -> bool:
    """Whether the training writes this run now or wrote it last: the run's status names its process, or one that it started."""
    status = durable.read_object(paths.metrics_dir / "status.json")
    pid, when = status.get("pid"), status.get("t")
    if status.get("host") != record.host or not isinstance(pid, int) or not isinstance(when, int | float) or when < record.time:
        return False
    return pid == record.process.pid or belongs_to(pid, record.process)
