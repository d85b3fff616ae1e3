"""F8: a signal at any moment ends a run with the right exit status and a whole checkpoint, and it resumes bit for bit."""

import contextlib
import random
import signal
import subprocess
import time
from collections import Counter

import pytest
from tests.support.disturbed import WORDS, Straight, committed, forget, moments, must_hold, undisturbed
from tests.support.processes import left_of
from tests.support.projects import Answer, Project, wait_until

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


@pytest.fixture(scope="module")
def straight(make_project, tmp_path_factory: pytest.TempPathFactory):
    return undisturbed(make_project(tmp_path_factory.mktemp("straight") / "project"))


@pytest.mark.medium
@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_at_a_random_moment_costs_nothing(project: Project, straight, sent: str) -> None:
    seconds = random.Random(sent).uniform(0.1, 1.0) * straight.seconds
    must_hold(project, project.type(*WORDS, after=(seconds, sent)), sent, straight)


@pytest.mark.slow
def test_a_hundred_signals_at_random_moments_cost_nothing(project: Project, straight) -> None:
    kinds = Counter()
    for number in range(100):
        sent = SIGNALS[number % len(SIGNALS)]
        seconds = random.Random(number).uniform(0.0, 1.05) * straight.seconds
        kinds[must_hold(project, project.type(*WORDS, after=(seconds, sent)), sent, straight)] += 1
        forget(project)
    print(f"F8, one process: {dict(kinds)}")
    assert kinds["saved"] >= 50


def kill_at(project: Project, words: tuple[str, ...], seconds: float, sent: str, *, training: bool = False) -> Answer:
    """Run `python -m llamahome` itself and send it a signal some seconds after its start, or after its first checkpoint if `training`."""
    with project.start(*words) as process:
        if training:
            wait_until(lambda: committed(project) or process.poll() is not None, seconds=300)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        process.send_signal(signal.Signals[sent])
        out, err = process.communicate(timeout=400)
    return Answer(("llamahome", *words), process.returncode, out, err)


@pytest.mark.slow
def test_twenty_signals_from_the_start_of_the_interpreter_on_cost_nothing(project: Project, straight) -> None:
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


TWO = (*WORDS, "--world-size", "2", "--epochs", "6", "--set", "checkpoint.keep_last=30")


@pytest.fixture(scope="module")
def straight_of_two(make_project, tmp_path_factory: pytest.TempPathFactory):
    project = make_project(tmp_path_factory.mktemp("two") / "project")
    started = time.monotonic()
    project.shell(*TWO).expect(0)
    return Straight(project.run.weights(), moments(project), time.monotonic() - started)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [*SIGNALS, "SIGKILL"])
@pytest.mark.parametrize("training", [False, True])
def test_a_signal_to_the_launcher_of_two_processes_costs_nothing(project: Project, straight_of_two, sent: str, training: bool) -> None:
    """From the start of the interpreter on, or after the first checkpoint. Processes without a launcher save and end."""
    seconds = random.Random(f"{sent} {training}").uniform(0.0, 0.5 if training else straight_of_two.seconds)
    answer = kill_at(project, TWO, seconds, sent, training=training)
    assert left_of(project, 150) == []
    whole = committed(project)
    assert "Traceback" not in answer.err, answer.err
    if answer.status == 75:
        assert whole and answer.err.count("stopped[run.stopped]") == 1, answer.err
    else:
        assert answer.status in (0, 130, -signal.Signals[sent]) and not (training and answer.status == 130), answer.err
    print(f"F8, two processes, {sent}: {answer.status}")
    if answer.status != 0:
        project.shell(*(("train-resume", "latest") if whole else TWO)).expect(0)
    assert project.run.weights() == straight_of_two.weights and moments(project) == straight_of_two.moments


@pytest.mark.medium
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGUSR1"])
def test_a_signal_in_an_export_leaves_nothing_half_written(project: Project, sent: str) -> None:
    project.type("train", "chats.jsonl", "--max-steps", "1").expect(0)
    words = ("export", "latest", "--to", "merged", "--output", "merged")
    answer = project.type(*words, at=[("llamahome.export:_write_merged", 1, [sent])])
    assert answer.status == 130 and "left at once" in answer.err and "Traceback" not in answer.err
    assert not list(project.folder.glob("*merged*"))
    project.type(*words).expect(0)


@pytest.mark.slow
def test_a_signal_while_the_passes_are_compiled_is_kept_until_there_is_something_to_save(project: Project, tmp_path) -> None:
    compiled = ("--set", "training.compile=true")
    project.type(*WORDS, *compiled).expect(0)
    straight = Straight(project.run.weights(), moments(project), 0.0)
    forget(project)
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    answer = project.type(*WORDS, *compiled, at=[("llamahome.model.backends.cpu.native:_compile", 1, ["SIGTERM"])], **cache)
    assert must_hold(project, answer, "SIGTERM", straight, *compiled) == "saved"
