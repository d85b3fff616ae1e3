"""training.restart: auto. A single process that crashes goes on by itself; what would come again, and what a user asked for, ends it."""

import os
import signal

import psutil
import pytest
from tests.e2e.test_restarts import is_gone, ranks_of
from tests.support.processes import left_of
from tests.support.projects import Project, wait_until

AUTO = ("--set", "training.restart=auto")
WORDS = ("chats.jsonl", "--epochs", "8", "--set", "checkpoint.every=2 steps", "--set", "checkpoint.keep_last=100")


def kill_when(project: Project, launcher: int, step: int, number: signal.Signals = signal.SIGKILL) -> psutil.Process | None:
    """Send the single process of a launcher a signal once the checkpoint of `step` is there; None if it has ended before."""
    wait_until(lambda: step in saved(project) or is_gone(psutil.Process(launcher)), seconds=300)
    process = ranks_of(launcher).get(0)
    if process is not None:
        process.send_signal(number)
        wait_until(lambda: is_gone(process))
    return process


def saved(project: Project) -> list[int]:
    return project.run.checkpoints if project.run.root.exists() else []


@pytest.mark.slow
def test_a_killed_process_goes_on_from_its_newest_checkpoint_with_identical_weights(project: Project) -> None:
    project.shell("train", *WORDS).expect(0)
    weights, before = project.run.weights(), project.run.root.resolve()
    with project.start("train", *WORDS, *AUTO) as launcher:
        wait_until(lambda: project.run.root.resolve() != before)
        assert kill_when(project, launcher.pid, 4) is not None
        _, err = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, err
    assert "process 0 was killed by SIGKILL: starting the process again from the newest checkpoint (1 of 3)" in err
    assert "Traceback" not in err and "error[" not in err
    assert len(project.runs()) == 2 and project.run.weights() == weights
    assert list(project.run.by_step("train/loss")) == list(range(1, 41))
    assert left_of(project) == []


@pytest.mark.slow
def test_a_crash_loop_stops_after_max_restarts_with_the_first_cause_on_top(project: Project) -> None:
    with project.start("train", *WORDS, *AUTO, "--set", "distributed.max_restarts=1", "--epochs", "200") as launcher:
        first = kill_when(project, launcher.pid, 2, signal.SIGSEGV)
        wait_until(lambda: 0 in ranks_of(launcher.pid) and ranks_of(launcher.pid)[0] != first)
        kill_when(project, launcher.pid, saved(project)[-1] + 4, signal.SIGKILL)
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 4, err
    assert err.index("error[distributed.process-killed]: process 0 was killed by SIGSEGV") < err.index("error[distributed.crash-loop]")
    assert "this was the first of 2 failures, and no restart is left; the last one: process 0 was killed by SIGKILL" in err
    assert left_of(project) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_is_not_restarted(project: Project, number: signal.Signals) -> None:
    with project.start("train", *WORDS, *AUTO, "--epochs", "200") as launcher:
        wait_until(lambda: 2 in saved(project), seconds=300)
        os.kill(launcher.pid, number)
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 75, err
    assert err.count("stopped[run.stopped]") == 1 and "starting the process again" not in err
    assert left_of(project) == []


@pytest.mark.medium
def test_a_mistake_in_the_data_is_not_restarted(project: Project) -> None:
    (project.folder / "bad.jsonl").write_text('{"messages": [\n')
    answer = project.shell("train", "bad.jsonl", *AUTO).expect(3)
    assert answer.codes == ["data.bad-json"] and "starting the process again" not in answer.err
