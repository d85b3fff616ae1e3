"""Whether a process trains in a run now, asked before a command changes the run's checkpoints: two at once would remove each other's.

A process of this machine is asked for by its number; one that was stopped still counts, because it may go on. Of a process of another
machine only the heartbeat in status.json can be seen, so whoever has to know waits for the next one. A run that is just being resumed has
no heartbeat yet; so whoever resumes it locks its folder, on file systems that can lock a folder.
"""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llamahome.durable import read_object
from llamahome.errors import CheckpointError, Problem
from llamahome.monitoring.runs import is_alive
from llamahome.monitoring.status import LOST_AFTER_SECONDS
from llamahome.rundir import RunPaths, as_typed

_POLL_S = 0.5


def require_idle(paths: RunPaths, consequence: str, *, hint: str | None = None, waits: Callable[[str], None] | None = None) -> None:
    """Raise CheckpointError checkpoint.in-use, with the `consequence`, if a process trains in the run now.

    With `waits`, a heartbeat of another machine that is not old is no proof: the next one is waited for, at most 30 s, and `waits` is
    called with a line that says so.
    """
    status = read_object(paths.metrics_dir / "status.json")
    heartbeat = status.get("t")
    if status.get("state") != "running" or not isinstance(heartbeat, int | float):
        return
    if status.get("host") == socket.gethostname():
        lives = is_alive(status.get("pid"), heartbeat)
    else:
        lives = time.time() - heartbeat <= LOST_AFTER_SECONDS and (waits is None or _beats_again(paths, status, waits))
    if lives:
        message = f"process {status.get('pid')} on {status.get('host')} is training in this run now: {consequence}"
        raise CheckpointError(Problem(code="checkpoint.in-use", message=message, where=as_typed(paths.root), hint=hint))


@contextmanager
def claimed(paths: RunPaths, consequence: str, *, hint: str | None = None) -> Iterator[None]:
    """Keep other processes of this machine from claiming the run while the block runs. Raises CheckpointError checkpoint.in-use.

    The lock leaves no file, and the system releases it if the process is killed. Network file systems may refuse to lock a folder;
    then only the heartbeat protects the run.
    """
    folder = os.open(paths.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another process is resuming this run now: {consequence}"
            raise CheckpointError(Problem(code="checkpoint.in-use", message=message, where=as_typed(paths.root), hint=hint)) from None
        except OSError:
            pass  # nothing can be locked there
        yield
    finally:
        os.close(folder)


def _beats_again(paths: RunPaths, status: dict[str, Any], waits: Callable[[str], None]) -> bool:
    """Whether the heartbeat of `status` is followed by another one before it is old."""
    waits(f"the run was training {time.time() - status['t']:.0f} s ago on {status.get('host')}: waiting for a sign that it still does")
    while time.time() - status["t"] <= LOST_AFTER_SECONDS:
        now = read_object(paths.metrics_dir / "status.json")
        if now.get("t") != status["t"] and now:
            return bool(now.get("state") == "running")
        time.sleep(_POLL_S)
    return False
