"""F8: a signal at any moment ends a run with the right exit status and a whole checkpoint, and it resumes bit for bit."""

import contextlib
import random
import signal
import subprocess
import time
from collections import Counter

import pytest
from tests.e2e.conftest import make_project, project, prompt, tiny_model  # noqa: F401 (fixtures)
from tests.support.disturbed import WORDS, Straight, committed, forget, moments, must_hold, running_in, undisturbed
from tests.support.projects import Answer, Project, wait_until

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


@pytest.fixture(scope="module")
def straight(make_project, tmp_path_factory: pytest.TempPathFactory):  # noqa: F811
    return undisturbed(make_project(tmp_path_factory.mktemp("straight") / "project"))


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_at_a_random_moment_costs_nothing(project: Project, straight, sent: str) -> None:  # noqa: F811
    seconds = random.Random(sent).uniform(0.1, 1.0) * straight.seconds
    must_hold(project, project.type(*WORDS, after=(seconds, sent)), sent, straight)


@pytest.mark.slow
def test_a_hundred_signals_at_random_moments_cost_nothing(project: Project, straight) -> None:  # noqa: F811
    kinds = Counter()
    for number in range(100):
        sent = SIGNALS[number % len(SIGNALS)]
        seconds = random.Random(number).uniform(0.0, 1.05) * straight.seconds
        kinds[must_hold(project, project.type(*WORDS, after=(seconds, sent)), sent, straight)] += 1
        forget(project)
    print(f"F8, one process: {dict(kinds)}")
    assert kinds["saved"] >= 50


def kill_at(project: Project, words: tuple[str, ...], seconds: float, sent: str) -> Answer:  # noqa: F811
    """Run `python -m llamahome` itself, from the start of the interpreter on, and send the launcher a signal after some time."""
    with project.start(*words) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        process.send_signal(signal.Signals[sent])
        out, err = process.communicate(timeout=240)
    return Answer(("llamahome", *words), process.returncode, out, err)


@pytest.mark.slow
def test_twenty_signals_from_the_start_of_the_interpreter_on_cost_nothing(project: Project, straight) -> None:  # noqa: F811
    started = time.monotonic()
    project.shell(*WORDS).expect(0)
    whole, kinds = time.monotonic() - started, Counter()
    forget(project)
    for number in range(20):
        sent = SIGNALS[number % len(SIGNALS)]
        seconds = random.Random(number).uniform(0.0, 0.8) * whole
        kinds[must_hold(project, kill_at(project, WORDS, seconds, sent), sent, straight)] += 1
        forget(project)
    print(f"F8, one process with its start: {dict(kinds)}")


TWO = ("--world-size", "2", "--set", "checkpoint.keep_last=3")


@pytest.mark.slow
def test_signals_and_kills_of_a_launcher_of_two_processes_at_random_moments_cost_nothing(project: Project) -> None:  # noqa: F811
    """Also the launcher alone, killed with -9: its processes save a checkpoint and end."""
    started = time.monotonic()
    project.shell(*WORDS, *TWO).expect(0)
    whole, kinds = time.monotonic() - started, Counter()
    straight = Straight(project.run.weights(), moments(project), whole)
    forget(project)
    for number in range(15):
        sent = (*SIGNALS, "SIGKILL")[number % 5]
        seconds = random.Random(number).uniform(0.0, 1.0) * whole
        answer = kill_at(project, (*WORDS, *TWO), seconds, sent)
        wait_until(lambda: running_in(project) == [], seconds=90)
        whole_ones = committed(project)
        if answer.status == 0:
            kind = "finished"
        elif answer.status == 75:
            kind = "saved"
            assert whole_ones and answer.err.count("stopped[run.stopped]") == 1, answer.err
        else:
            kind = "left" if answer.status == 130 else "killed"
            assert answer.status in (130, -signal.Signals[sent]), answer.err
        kinds[kind] += 1
        assert "Traceback" not in answer.err, answer.err
        if kind != "finished":
            words = ("train-resume", "latest") if whole_ones else (*WORDS, *TWO)
            project.shell(*words).expect(0)
        assert project.run.weights() == straight.weights and moments(project) == straight.moments, f"{number} {sent} {kind}"
        forget(project)
    print(f"F8, two processes: {dict(kinds)}")


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGUSR1"])
def test_a_signal_in_an_export_leaves_nothing_half_written(project: Project, sent: str) -> None:  # noqa: F811
    project.type("train", "chats.jsonl", "--max-steps", "1").expect(0)
    words = ("export", "latest", "--to", "merged", "--output", "merged")
    answer = project.type(*words, at=[("llamahome.export:_write_merged", 1, [sent])])
    assert answer.status == 130 and "left at once" in answer.err and "Traceback" not in answer.err
    assert not list(project.folder.glob("*merged*"))
    project.type(*words).expect(0)
