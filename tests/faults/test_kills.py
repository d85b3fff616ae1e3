"""F1: kill -9 at any moment, also inside a save; every resume ends with the bits of the undisturbed run."""

import random
from collections import Counter

import pytest
from tests.support.disturbed import WORDS, forget, must_hold, undisturbed
from tests.support.projects import Project

INSIDE = "llamahome.durable:_observe?checkpoint-"
"""Before each file operation of a save, the renames and the retention of older checkpoints included."""


@pytest.fixture(scope="module")
def straight(make_project, tmp_path_factory: pytest.TempPathFactory):
    return undisturbed(make_project(tmp_path_factory.mktemp("straight") / "project"))


def killed_inside(project: Project, straight, operation: int) -> str:
    """Kill a run before that file operation of its saves; the kind of ending."""
    return must_hold(project, project.type(*WORDS, at=[(INSIDE, operation, ["SIGKILL"])]), "SIGKILL", straight)


@pytest.mark.parametrize("operation", [3, 30])
def test_kill_9_inside_a_save_costs_nothing(project: Project, straight, operation: int) -> None:
    assert killed_inside(project, straight, operation) == "killed"


def test_kill_9_at_a_random_moment_costs_nothing(project: Project, straight) -> None:
    seconds = random.Random(7).uniform(0.3, 0.9) * straight.seconds
    must_hold(project, project.type(*WORDS, after=(seconds, "SIGKILL")), "SIGKILL", straight)


@pytest.mark.slow
def test_kill_9_at_a_hundred_file_operations_of_saves_costs_nothing(project: Project, straight) -> None:
    kinds, operation, operations = Counter(), 0, 0
    while kinds["killed"] < 100:
        operation += 1
        kind = killed_inside(project, straight, operation)
        kinds[kind] += 1
        if kind == "finished":  # there is no such operation: from the first one again, beside other steps of the training
            operation, operations = 0, operation - 1
        forget(project)
    print(f"F1, inside a save: {dict(kinds)} before {operations or operation} operations")


@pytest.mark.slow
def test_kill_9_at_two_hundred_random_moments_costs_nothing(project: Project, straight) -> None:
    kinds = Counter()
    for number in range(200):
        seconds = random.Random(number).uniform(0.0, 1.05) * straight.seconds
        kinds[must_hold(project, project.type(*WORDS, after=(seconds, "SIGKILL")), "SIGKILL", straight)] += 1
        forget(project)
    print(f"F1, at random moments: {dict(kinds)}")
    assert kinds["killed"] >= 150
