"""A run is in use while the process that trains in it lives, here or on another machine."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamahome.errors import CheckpointError
from llamahome.monitoring import in_use
from llamahome.monitoring.in_use import claimed, require_idle
from llamahome.rundir import RunPaths


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunPaths]:
    """Writes status.json of a run."""
    monkeypatch.chdir(tmp_path)
    paths = RunPaths(tmp_path / "run", "20260101-000000-brisk-otter")
    paths.metrics_dir.mkdir(parents=True)

    def write(**changes: object) -> RunPaths:
        record = {"state": "running", "pid": os.getpid(), "host": socket.gethostname(), "t": time.time(), **changes}
        (paths.metrics_dir / "status.json").write_text(json.dumps(record))
        return paths

    return write


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as sleeping:
        yield sleeping
        sleeping.kill()


def test_a_process_of_this_machine_is_in_the_run_even_if_it_was_stopped(told, process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(CheckpointError) as caught:
        require_idle(told(pid=process.pid, t=time.time() + 0.1), "nothing is changed")
    problem = caught.value.problems[0]
    assert (
        problem.code == "checkpoint.in-use" and f"process {process.pid} on" in problem.message and "nothing is changed" in problem.message
    )
    process.kill()
    process.wait()
    require_idle(told(pid=process.pid), "nothing is changed")


def test_a_younger_process_of_the_same_number_is_another_one(told, process: subprocess.Popen) -> None:
    """As in a container that was started again."""
    require_idle(told(pid=process.pid, t=time.time() - 20), "nothing is changed")


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_has_ended_is_idle(told, state: str) -> None:
    require_idle(told(state=state), "nothing is changed")


def test_a_heartbeat_of_another_machine_counts_if_the_next_one_follows(told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_use, "LOST_AFTER_SECONDS", 1.0)
    said: list[str] = []
    require_idle(told(host="elsewhere"), "nothing is changed", waits=said.append)
    assert len(said) == 1 and "elsewhere" in said[0]
    require_idle(told(host="elsewhere", t=time.time() - 2), "nothing is changed")
    with pytest.raises(CheckpointError):
        require_idle(told(host="elsewhere"), "nothing is changed")
    beat = threading.Timer(0.3, lambda: told(host="elsewhere"))
    beat.start()
    with pytest.raises(CheckpointError):
        require_idle(told(host="elsewhere"), "nothing is changed", waits=said.append)
    beat.join()


def test_a_run_is_claimed_by_one_process_until_that_ends_or_is_killed(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "20260101-000000-brisk-otter")
    code = "import fcntl, os, time; f = os.open('.', os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CheckpointError) as caught, claimed(paths, "nothing is changed", hint="wait"):
            raise AssertionError
        other.kill()
    problem = caught.value.problems[0]
    assert (problem.code, problem.hint) == ("checkpoint.in-use", "wait") and "nothing is changed" in problem.message
    for _ in range(2):
        with claimed(paths, "nothing is changed"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_claimed_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(in_use.fcntl, "flock", refuse)
    with claimed(RunPaths(tmp_path, "run"), "nothing is changed"):
        pass
