"""A signal reaches only a process that the page started, and only once."""

import errno
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from tests.support.dashboards import write_run, write_status
from tests.support.projects import wait_until

from llamahome import durable
from llamahome.dashboard import started
from llamahome.dashboard.started import Record, RefusedStart, StartedTrainings
from llamahome.monitoring.processes import identify, is_python_module
from llamahome.rundir import RunPaths


def test_one_training_at_a_time_is_started_and_asked_once_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here, later = StartedTrainings(), StartedTrainings()  # another server after this one
    record = here.start(["dashboard", "--port", "0"])  # a command that ends on SIGTERM, as train does
    try:
        wait_until(lambda: "listening" in here.printed(record.name))
        with pytest.raises(RefusedStart, match="still runs"):
            later.start(["dashboard", "--port", "0"])
        assert later.find(record.name) == record and later.is_alive(record)
        later.stop(record.name, None)
        with pytest.raises(RefusedStart):
            here.stop(record.name, None)
        wait_until(lambda: here.status(record.name) is not None)
        assert here.status(record.name) == 0 and not later.is_alive(record) and not here.is_alive(record)
    finally:
        os.killpg(record.process.pid, signal.SIGKILL) if here.status(record.name) is None else None


def test_only_the_process_that_was_started_is_signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainings = StartedTrainings()
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            itself = identify(other.pid)
            record = Record("20261129-114732-692279", ("train", "x"), socket.gethostname(), itself, time.time())
            trainings._folder.mkdir(parents=True)
            for process in (itself, type(itself)(other.pid, itself.born - 100)):  # not llamahome; its number was used again
                trainings._write(type(record)(**{**record.__dict__, "process": process}))
                with pytest.raises(RefusedStart, match="has ended"):
                    trainings.stop(record.name, None)
            assert other.poll() is None
        finally:
            other.kill()


def test_a_run_of_another_process_is_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainings = StartedTrainings()
    record = trainings.start(["dashboard", "--port", "0"])
    try:
        metrics = write_run(tmp_path, "theirs", state="running")  # by this process, which it did not start
        paths = RunPaths(tmp_path / "output/runs/theirs", "theirs")
        assert trainings.with_run(record, [paths]).run is None
        with pytest.raises(RefusedStart, match="another process"):
            trainings.stop(record.name, paths)
        assert trainings.is_alive(record)
        write_status(metrics, state="running", step=1, horizon=2, pid=record.process.pid)
        assert trainings.with_run(record, [paths]).run == "theirs" and trainings.of_run("theirs").name == record.name
        trainings.stop(record.name, paths)
        wait_until(lambda: trainings.status(record.name) is not None)
    finally:
        os.killpg(record.process.pid, signal.SIGKILL) if trainings.status(record.name) is None else None


def test_a_process_that_has_no_command_line_yet_can_be_stopped_as_soon_as_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    early = iter([False] * 3)
    monkeypatch.setattr(
        started, "is_python_module", lambda process, module: next(early, None) is None and is_python_module(process, module)
    )
    trainings = StartedTrainings()
    record = trainings.start(["dashboard", "--port", "0"])
    trainings.stop(record.name, None)
    wait_until(lambda: trainings.status(record.name) is not None)
    assert [each.asked_to_stop for each in trainings.records()] == [True]


def test_on_a_disk_that_cannot_be_written_nothing_is_started_and_a_training_can_still_be_stopped_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainings = StartedTrainings()
    record = trainings.start(["dashboard", "--port", "0"])
    try:
        wait_until(lambda: "listening" in trainings.printed(record.name))

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(durable, "write_whole", full)
        with pytest.raises(RefusedStart, match="still runs"):
            trainings.start(["dashboard", "--port", "0"])
        trainings.stop(record.name, None)
        with pytest.raises(RefusedStart, match=r"asked to stop already|has ended"):
            trainings.stop(record.name, None)
        wait_until(lambda: trainings.status(record.name) is not None)
        assert trainings.status(record.name) == 0
        with pytest.raises(RefusedStart, match="cannot be written: No space left on device"):
            trainings.start(["dashboard", "--port", "0"])
    finally:
        os.killpg(record.process.pid, signal.SIGKILL) if trainings.status(record.name) is None else None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"words": [1]}', "null"])
def test_a_damaged_record_of_a_training_is_no_record(tmp_path: Path, content: str) -> None:
    trainings, name = StartedTrainings(tmp_path), "20261129-114732-692279"
    (tmp_path / f"{name}.json").write_text(content)
    assert trainings.find(name) is None and trainings.records() == []
