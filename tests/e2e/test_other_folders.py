"""A run that is named from another working folder is read as it is, and is resumed where its rows are."""

import shlex
from pathlib import Path

import pytest
from tests.support.projects import Project, RunFiles

TRAIN = ("train", "chats.jsonl", "--max-steps", "2")


@pytest.fixture
def elsewhere(project: Project, tmp_path: Path) -> Project:
    other = Project(tmp_path / "else where", project.prompt)
    other.folder.mkdir()
    return other


@pytest.mark.parametrize("output", [(), ("--output", "my run")])
def test_a_run_is_shown_from_anywhere_and_resumed_by_the_printed_command(
    project: Project, elsewhere: Project, output: tuple[str, ...]
) -> None:
    project.type(*TRAIN, *output).expect(0)
    root = str(project.folder / output[1]) if output else str(project.run.root.resolve())
    shown = elsewhere.type("runs", "show", root, "--json").expect(0).json
    assert (shown["state"], shown["step"]) == ("finished", 2)
    refused = elsewhere.type("train-resume", root, "--max-steps", "3").expect(3)
    assert refused.codes == ["data.not-found"]
    cd, folder, then, *command = shlex.split(refused.helps[0])
    assert (cd, folder, then, command[0]) == ("cd", str(project.folder), "&&", "llamahome")
    assert list(elsewhere.folder.iterdir()) == []
    assert "resuming" in project.type(*command[1:]).expect(0).err
    assert list(RunFiles(project.folder, Path(root)).by_step("train/loss")) == [1, 2, 3]


def test_rows_that_are_gone_are_asked_for_by_name(project: Project) -> None:
    project.type(*TRAIN).expect(0)
    (project.folder / "chats.jsonl").rename(project.folder / "other.jsonl")
    refused = project.type("train-resume", "latest", "--max-steps", "3").expect(3)
    assert refused.codes == ["data.not-found"] and "chats.jsonl" in refused.err and project.run.paths.run_id in refused.err
    assert "put them back" in refused.helps[0] and "train-resume" in refused.helps[0]


def test_metrics_go_on_where_the_run_has_them(project: Project, elsewhere: Project) -> None:
    project.type(*TRAIN).expect(0)
    (elsewhere.folder / "data").mkdir()
    (elsewhere.folder / "data/models").symlink_to(project.folder / "data/models")
    (elsewhere.folder / "chats.jsonl").write_bytes((project.folder / "chats.jsonl").read_bytes())
    elsewhere.type("train-resume", str(project.run.root.resolve()), "--max-steps", "3").expect(0)
    assert list(project.run.by_step("train/loss")) == [1, 2, 3]
    assert not (elsewhere.folder / "data/metrics/logs").exists()


def test_a_file_that_begins_with_a_dash_is_named_in_a_form_that_works(project: Project) -> None:
    (project.folder / "-rows.jsonl").write_bytes((project.folder / "chats.jsonl").read_bytes())
    refused = project.type("data", "check", "-rows.jsonl").expect(2)
    assert refused.helps == ["llamahome data check ./-rows.jsonl"]
    project.type(*shlex.split(refused.helps[0])[1:]).expect(0)
