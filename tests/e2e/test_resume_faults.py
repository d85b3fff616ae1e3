"""Faults at every file operation of the start of a resume: nothing is lost, and the next resume ends as the undisturbed run."""

import itertools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.e2e.conftest import LANES
from tests.support.projects import Project, Prompt

from llamahome.checkpoint import manifest
from llamahome.rundir import open_run

TRAIN = ("train", "chats.jsonl", "--max-steps", "4", "--set", "checkpoint.every=1 steps", "--set", "checkpoint.keep_last=4")
OPERATION, STEP = "llamahome.durable:_observe", "llamahome.training.loop:train_step"
FAULTS = ("SIGKILL", "EIO", "ENOSPC", "SHORT")


@pytest.fixture(scope="module")
def stopped(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, bytes]]:
    """A run that was killed in step 4, and the weights with which it ends without faults."""
    project = make_project(tmp_path_factory.mktemp("stopped") / "project")
    project.type(*TRAIN).expect(0)
    expected = project.run.weights()
    shutil.rmtree(project.folder / "output")
    assert project.type(*TRAIN, at=[(STEP, 4, ["SIGKILL"])]).status == -9
    return project, expected


def _fault_at(stopped: tuple[Project, dict[str, bytes]], folder: Path, prompt: Prompt, fault: str, number: int) -> bool:
    """Resume from checkpoint 2, which sets later ones aside, with a fault at the n-th operation; then resume. False if there is none."""
    project, expected = stopped
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(project.folder, folder, symlinks=True)
    copy = Project(folder, prompt)
    (run_id,) = copy.runs()
    run = f"output/runs/{run_id}"
    at = [(OPERATION, number, ["STRUCK", fault]), (STEP, 1, ["SIGKILL"])]
    ended = copy.type("train-resume", f"{run}/checkpoint-2", at=at)
    struck = (folder / "struck").exists()
    assert ended.status == -9 or (ended.codes and "Traceback" not in ended.err), ended.err
    whole = {step: manifest.verify(path) for step, path in open_run(folder / run).checkpoints()}
    assert whole.keys() >= {1, 2} and not any(whole.values()), (fault, number, whole)
    assert (not list((folder / run).glob("*.tmp")) and not list((folder / run).glob(".*.tmp"))) or fault == "SIGKILL"
    copy.type("train-resume", run).expect(0)
    assert copy.run.weights() == expected, (fault, number)
    return struck


@pytest.mark.medium
@pytest.mark.parametrize(("fault", "number"), [("SHORT", 5)])
def test_a_fault_at_the_start_of_a_resume_loses_nothing(
    stopped: tuple[Project, dict[str, bytes]], tmp_path: Path, fault: str, number: int
) -> None:
    assert _fault_at(stopped, tmp_path / "project", stopped[0].prompt, fault, number)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_operation_of_the_start_of_a_resume_loses_nothing(
    stopped: tuple[Project, dict[str, bytes]], lanes: list[Project], fault: str
) -> None:
    """Every lane takes its share of the operations, until there is none of that number."""

    def every(lane: int) -> int:
        folder, prompt = lanes[lane].folder, lanes[lane].prompt
        return next(n for n in itertools.count(lane + 1, LANES) if not _fault_at(stopped, folder, prompt, fault, n))

    with ThreadPoolExecutor(LANES) as threads:
        reached = sorted(threads.map(every, range(LANES)))
    assert reached == list(range(reached[0], reached[0] + LANES)) and reached[0] > 10, "all operations below that number were struck"
    print(f"{fault} at each of {reached[0] - 1} operations")
