"""F1: kill -9 at any moment, also inside a save; every resume ends with the bits of the undisturbed run."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.conftest import LANES
from tests.support.disturbed import WORDS, Straight, forget, must_hold, undisturbed
from tests.support.projects import Project

INSIDE = "llamahome.durable:_observe?checkpoint-"
"""Before each file operation of a save, the renames and the retention of older checkpoints included."""


@pytest.fixture(scope="module")
def straight(make_project, tmp_path_factory: pytest.TempPathFactory):
    return undisturbed(make_project(tmp_path_factory.mktemp("straight") / "project"))


def killed_inside(project: Project, straight, operation: int) -> str:
    """Kill a run before that file operation of its saves; the kind of ending."""
    return must_hold(project, project.type(*WORDS, at=[(INSIDE, operation, ["SIGKILL"])]), "SIGKILL", straight)


@pytest.mark.parametrize("operation", [3, pytest.param(30, marks=pytest.mark.medium)])
def test_kill_9_inside_a_save_costs_nothing(project: Project, straight, operation: int) -> None:
    assert killed_inside(project, straight, operation) == "killed"


@pytest.mark.medium
def test_kill_9_at_a_random_moment_costs_nothing(project: Project, straight) -> None:
    seconds = random.Random(7).uniform(0.3, 0.9) * straight.seconds
    must_hold(project, project.type(*WORDS, after=(seconds, "SIGKILL")), "SIGKILL", straight)


@pytest.fixture
def side_by_side(lanes: list[Project]) -> Iterator[Callable[[Callable[[int, Project, Straight], Counter]], Counter]]:
    """Gives every lane to a function in a thread of its own, with the undisturbed run of the lane; adds up what the functions count."""
    with ThreadPoolExecutor(len(lanes)) as threads:

        def run(work: Callable[[int, Project, Straight], Counter]) -> Counter:
            straights = list(threads.map(undisturbed, lanes))  # at the same time, so that their time is that of the runs to come
            assert all(each.weights == straights[0].weights for each in straights)
            return sum(threads.map(work, range(len(lanes)), lanes, straights), Counter())

        yield run


@pytest.mark.slow
def test_kill_9_at_a_hundred_file_operations_of_saves_costs_nothing(side_by_side) -> None:
    def kill(lane: int, project: Project, straight: Straight) -> Counter:
        kinds, operation, most = Counter(), lane + 1, 0
        while kinds["killed"] < 100 // LANES:
            kind = killed_inside(project, straight, operation)
            kinds[kind] += 1
            most = max(most, operation if kind == "killed" else 0)
            # after the last operation from the first ones again, beside other steps of the training
            operation = operation + LANES if kind == "killed" else operation % LANES + 1
            forget(project)
        print(f"F1, inside a save, lane {lane}: {dict(kinds)}, up to operation {most}")
        return kinds

    assert side_by_side(kill)["killed"] == 100


@pytest.mark.slow
def test_kill_9_at_two_hundred_random_moments_costs_nothing(side_by_side) -> None:
    def kill(lane: int, project: Project, straight: Straight) -> Counter:
        kinds = Counter()
        for number in range(lane, 200, LANES):
            seconds = random.Random(number).uniform(0.0, 1.05) * straight.seconds
            kinds[must_hold(project, project.type(*WORDS, after=(seconds, "SIGKILL")), "SIGKILL", straight)] += 1
            forget(project)
        return kinds

    kinds = side_by_side(kill)
    print(f"F1, at random moments: {dict(kinds)}")
    assert kinds["killed"] >= 150
