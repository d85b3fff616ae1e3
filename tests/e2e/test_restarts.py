"""If a process of a run is killed, all start again, and the final weights are bit-identical to those of an undisturbed run."""

import os
import random
import signal
import time
from collections.abc import Callable

import psutil
import pytest
from tests.e2e.test_processes import steps_done
from tests.support.processes import left_of
from tests.support.projects import Project, wait_until

WORDS = ("chats.jsonl", "--world-size", "2", "--epochs", "4", "--set", "checkpoint.every=2 steps", "--set", "checkpoint.keep_last=100")


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """The current processes of a launcher, by rank."""
    found = {}
    for child in psutil.Process(launcher).children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            continue
    return found


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it was reaped between the two calls
        return True


def killed(project: Project, when: Callable[[], bool], victims: list[int], *words: str) -> tuple[int, str]:
    """Train, and kill the process of each rank in `victims` once `when` is true; exit status and stderr of the launcher."""
    with project.start("train-distributed", *WORDS, *words) as launcher:
        for victim in victims:
            wait_until(lambda: when() or launcher.poll() is not None, seconds=120)
            process = ranks_of(launcher.pid).get(victim) if launcher.poll() is None else None
            if process is not None:
                process.kill()
                wait_until(lambda process=process: is_gone(process))
        _, err = launcher.communicate(timeout=240)
    return launcher.returncode, err


@pytest.mark.medium
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_after_a_killed_process_the_run_restarts_with_identical_weights(project: Project, victim: int) -> None:
    project.shell("train-distributed", *WORDS).expect(0)
    straight, weights = project.run.by_step("train/loss"), project.run.weights()
    assert "saves-in-the-loop" not in [event["kind"] for event in project.run.lines("events")]
    before = project.run.root.resolve()
    status, err = killed(project, lambda: project.run.root.resolve() != before and 4 in project.run.checkpoints, [victim])
    assert status == 0, err
    assert f"process {victim} was killed by SIGKILL: starting all processes again from the newest checkpoint (1 of 3)" in err
    assert "Traceback" not in err and "error[" not in err
    assert len(project.runs()) == 2, "the second attempt goes on in the folder of the first"
    assert project.run.weights() == weights
    assert project.run.by_step("train/loss") == straight
    assert left_of(project) == []


@pytest.mark.medium
def test_without_a_restart_left_the_killed_process_is_the_error(project: Project) -> None:
    status, err = killed(project, lambda: steps_done(project), [1], "--set", "distributed.max_restarts=0")
    assert status == 4 and err.count("error[") == 1
    assert "error[distributed.process-killed]: process 1 was killed by SIGKILL" in err
    assert left_of(project) == []


@pytest.mark.slow
def test_a_process_killed_before_the_first_checkpoint_restarts_the_same_run(project: Project) -> None:
    status, err = killed(project, lambda: steps_done(project), [0], "--set", "checkpoint.every=1 h")
    assert status == 0, err
    assert len(project.runs()) == 1
    assert list(project.run.by_step("train/loss")) == list(range(1, 21))


@pytest.mark.slow
def test_after_twenty_kills_at_random_moments_the_weights_are_identical(project: Project) -> None:
    begin = time.monotonic()
    project.shell("train-distributed", *WORDS).expect(0)
    seconds, weights = time.monotonic() - begin, project.run.weights()
    kills = 0
    for seed in range(20):
        rng = random.Random(seed)
        with project.start("train-distributed", *WORDS) as launcher:
            time.sleep(rng.uniform(0.3, 1.0) * seconds)
            ranks = ranks_of(launcher.pid) if launcher.poll() is None else {}
            if ranks:
                ranks[rng.choice(sorted(ranks))].kill()
                kills += 1
            _, err = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, err
        assert project.run.weights() == weights, f"seed {seed}"
        assert left_of(project) == []
    assert kills >= 10  # how many hit depends on how busy the machine was for the run that was timed


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", 0, 1])
def test_sigterm_to_any_process_saves_once_and_ends_all_with_75(project: Project, whom: str | int) -> None:
    words = (*WORDS[:3], "--epochs", "200")
    with project.start("train-distributed", *words) as launcher:
        wait_until(lambda: steps_done(project), seconds=120)
        os.kill(launcher.pid if whom == "launcher" else ranks_of(launcher.pid)[whom].pid, signal.SIGTERM)
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 75, err
    assert err.count("stopped[run.stopped]") == 1 and "error[" not in err and "starting all" not in err
    assert len([event for event in project.run.lines("events") if event["kind"] == "saved"]) == 1
    assert left_of(project) == []


@pytest.mark.slow
def test_kill_9_of_the_launcher_ends_all_processes_with_a_checkpoint(project: Project) -> None:
    with project.start("train-distributed", *WORDS[:3], "--epochs", "200") as launcher:
        wait_until(lambda: steps_done(project), seconds=120)
        launcher.kill()
        launcher.communicate(timeout=60)
    assert left_of(project, 60) == []
    assert len(project.run.checkpoints) == 1
