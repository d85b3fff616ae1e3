"""F8: a signal at any moment ends a run with the right exit status and a whole checkpoint, and it resumes bit for bit."""

import random
from collections import Counter

import pytest
from tests.e2e.conftest import make_project, project, prompt, tiny_model  # noqa: F401 (fixtures)
from tests.support.disturbed import WORDS, forget, must_hold, undisturbed
from tests.support.projects import Project

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
