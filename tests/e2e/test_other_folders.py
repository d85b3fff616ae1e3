"""A run that is named from another working folder is read as it is, and is resumed where its rows are."""

import shlex
import shutil
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


def test_every_command_knows_a_run_of_output_by_its_id(project: Project) -> None:
    project.type(*TRAIN, "--output", "deep/mine").expect(0)
    run_id = (project.folder / "deep/mine/run_id").read_text().strip()
    for name in (run_id, "mine"):
        project.type("chat", name, "--prompt", "hello", "--max-new-tokens", "2").expect(0)
        project.type("train-eval", name, "chats.jsonl").expect(0)
        assert project.type("checkpoint", "list", name, "--json").expect(0).json["run"] == run_id
        project.type("checkpoint", "verify", name).expect(0)
        project.type("runs", "show", name).expect(0)
    project.type("export", run_id, "--to", "merged", "--output", "merged").expect(0)
    project.type("train", "chats.jsonl", "--max-steps", "1", "--from-adapter", run_id).expect(0)
    assert f"resuming {run_id}" in project.type("train-resume", run_id, "--max-steps", "3").expect(0).err
    misspelt = project.type("train-resume", run_id.replace("mine", "mne")).expect(7)
    assert misspelt.helps[0].startswith(f"llamahome train-resume {run_id}")


@pytest.mark.parametrize("moved", [False, True])
def test_a_copied_or_moved_project_reads_and_writes_its_own_runs(project: Project, tmp_path: Path, moved: bool) -> None:
    project.type(*TRAIN).expect(0)
    project.type(*TRAIN, "--output", "deep/mine").expect(0)
    other = Project(tmp_path / "other", project.prompt)
    if moved:
        project.folder.rename(other.folder)
    else:
        shutil.copytree(project.folder, other.folder, symlinks=True)
    shown = other.type("runs", "list", "--json").expect(0).json
    assert sorted(str(Path(run["folder"]).parent) for run in shown) == ["deep", "output/runs"]
    (mine,) = [run["run_id"] for run in shown if run["folder"] == "deep/mine"]
    pages = [folder / "report.html" for folder in (project.folder / "deep/mine", other.folder / "deep/mine")]
    before = [page.stat().st_mtime_ns if page.exists() else 0 for page in pages]
    other.type("runs", "report", mine).expect(0)
    after = [page.stat().st_mtime_ns if page.exists() else 0 for page in pages]
    assert after[0] == before[0] and after[1] != before[1]


def test_a_copy_of_a_run_s_settings_takes_no_folder_of_a_run(project: Project) -> None:
    project.type(*TRAIN, "--output", "mine").expect(0)
    (project.folder / "copy.yaml").write_bytes((project.folder / "mine/config.yaml").read_bytes())
    project.type("train", "chats.jsonl", "--config", "copy.yaml").expect(0)
    assert project.run.root.resolve().parent == project.folder / "output/runs"


def test_the_next_commands_of_a_run_in_another_folder_work_there(project: Project, elsewhere: Project) -> None:
    project.type(*TRAIN).expect(0)
    ended = elsewhere.type("runs", "tail", str(project.run.root.resolve())).expect(0)
    (command,) = [line.partition("next: ")[2] for line in (ended.out + ended.err).splitlines() if "next: " in line]
    assert "finished" in elsewhere.type(*shlex.split(command)[1:]).expect(0).out
