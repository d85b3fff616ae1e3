"""A run whose folder was copied goes on beside its original, which nothing changes; a run whose folder was moved goes on as itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.projects import Project, RunFiles

TRAIN = ("train", "chats.jsonl", "--max-steps", "4", "--set", "checkpoint.every=2 steps", "--set", "checkpoint.keep_last=9")
COPIES = ("copy", "output/runs/copy")


@pytest.fixture(scope="module")
def trained(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With a run in `one`, and one under output/runs."""
    project = make_project(tmp_path_factory.mktemp("trained") / "project")
    project.type(*TRAIN, "--output", "one").expect(0)
    project.type(*TRAIN).expect(0)
    return project


@pytest.fixture
def project(trained: Project, tmp_path: Path) -> Project:
    copy = Project(tmp_path / "project", trained.prompt)
    shutil.copytree(trained.folder, copy.folder, symlinks=True)
    _remember_folders(trained, copy)
    return copy


def _remember_folders(trained: Project, copy: Project) -> None:
    """As if the runs had been trained in the copied project."""
    for status in (copy.folder / "data/metrics/logs").glob("*/status.json"):
        status.write_text(status.read_text().replace(str(trained.folder), str(copy.folder)))


def run_in(project: Project, folder: str) -> RunFiles:
    return RunFiles(project.folder, project.folder / folder)


def files_of(project: Project, run: RunFiles) -> dict[str, bytes]:
    """Everything of a run: its folder and its records."""
    folders = (run.root.resolve(), project.folder / run.paths.metrics_dir, project.folder / run.paths.tensorboard_dir)
    return {str(path): path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("folder", COPIES)
def test_a_copy_goes_on_with_an_id_and_records_of_its_own(project: Project, folder: str) -> None:
    original = run_in(project, "one" if folder == "copy" else "output/training")
    shutil.copytree(original.root, project.folder / folder)
    before = files_of(project, original)
    resumed = project.type("train-resume", folder, "--max-steps", "6").expect(0)
    copy = run_in(project, folder)
    name = copy.paths.run_id
    assert name != original.paths.run_id and name.endswith("-copy")
    told = [line for line in resumed.err.splitlines() if "is a copy of" in line]
    assert len(told) == 1 and told[0].endswith(f"it goes on as {name}, with copies of the records up to step 4")
    assert files_of(project, original) == before
    loss, first = copy.by_step("train/loss"), original.by_step("train/loss")
    assert sorted(loss) == [1, 2, 3, 4, 5, 6] and {step: loss[step] for step in first} == first
    assert copy.checkpoints == [2, 4, 6]
    kinds = {each["state"] for each in project.type("checkpoint", "list", folder, "--json").expect(0).json["checkpoints"]}
    assert kinds == {"whole"}, kinds
    for step in copy.checkpoints:
        assert project.type("checkpoint", "verify", f"{folder}/checkpoint-{step}", "--json").expect(0).json["valid"]
    again = project.type("train-resume", folder, "--max-steps", "7").expect(0)
    assert "is a copy of" not in again.err and run_in(project, folder).paths.run_id == name
    listed = {run["run_id"] for run in project.type("runs", "list", "--json").expect(0).json}
    assert {name, original.paths.run_id} <= listed


def test_a_copy_takes_over_no_record_after_its_checkpoint(project: Project) -> None:
    original = run_in(project, "one")
    shutil.copytree(original.root, project.folder / "copy")
    project.type("train-resume", "one", "--max-steps", "6").expect(0)
    project.type("train-resume", "copy/checkpoint-2", "--max-steps", "3").expect(0)
    copy = run_in(project, "copy")
    assert sorted(copy.by_step("train/loss")) == [1, 2, 3] and copy.checkpoints == [2, 3]
    assert all(line["step"] <= 3 for name in ("metrics", "events") for line in copy.lines(name) if "step" in line)
    assert not (project.folder / copy.paths.metrics_dir / "superseded.jsonl").exists()
    assert sorted(run_in(project, "one").by_step("train/loss")) == [1, 2, 3, 4, 5, 6]


def test_a_copy_goes_on_while_its_original_trains(project: Project) -> None:
    original = run_in(project, "one")
    shutil.copytree(original.root, project.folder / "copy")
    status = project.folder / original.paths.metrics_dir / "status.json"
    running = json.loads(status.read_text()) | {"state": "running", "pid": project.prompt._process.pid, "t": 2e9}
    status.write_text(json.dumps(running))
    assert project.type("train-resume", "one", "--max-steps", "5").codes == ["checkpoint.in-use"]
    project.type("train-resume", "copy", "--max-steps", "5").expect(0)
    assert json.loads(status.read_text()) == running


def _move(project: Project) -> str:
    (project.folder / "one").rename(project.folder / "moved")
    return "moved"


def _link(project: Project) -> str:
    (project.folder / "link").symlink_to("one")
    return "link"


def _copy_of_the_project(project: Project) -> str:
    other = project.folder.with_name("other")
    shutil.copytree(project.folder, other, symlinks=True)
    project.folder = other
    return "one"


@pytest.mark.parametrize("place", [_move, _link, _copy_of_the_project])
def test_a_run_in_another_place_stays_the_run_that_it_was(project: Project, place: Callable[[Project], Any]) -> None:
    before = run_in(project, "one").paths.run_id
    folder = place(project)
    resumed = project.type("train-resume", folder, "--max-steps", "5").expect(0)
    assert "is a copy of" not in resumed.err
    assert run_in(project, folder).paths.run_id == before
    assert sorted(run_in(project, folder).by_step("train/loss")) == [1, 2, 3, 4, 5]
