"""Runs are found by their ids wherever they lie, also in a project that was copied or moved, and named by what works when typed."""

import json
import shutil
from pathlib import Path

import pytest

from llamahome.known_runs import known_runs, newest_run, run_folders, runs_called, to_type
from llamahome.rundir import METRICS, NEWEST, RUNS, open_run


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def make(run_id: str, folder: Path | None = None) -> Path:
    """A run of this project, in `folder` if it was typed with --output."""
    root = folder or RUNS / run_id
    root.mkdir(parents=True)
    (root / "run_id").write_text(run_id + "\n")
    (METRICS / run_id).mkdir(parents=True)
    (METRICS / run_id / "status.json").write_text(json.dumps({"folder": str(root.resolve())}))
    return root.resolve()


def test_a_run_that_is_called_so_goes_before_those_whose_ids_contain_the_name():
    ids = ["20260101-000000-plain", "20260102-000000-plainer", "20260103-000000-not-plain", "mine"]
    assert runs_called("plain", ids) == ids[:1] and runs_called("mine", ids) == ids[3:]
    assert runs_called("plai", ids) == ids[:3] and runs_called("20260102", ids) == ids[1:2]
    assert runs_called("plain", [*ids, "20260104-000000-plain"]) == [ids[0], "20260104-000000-plain"], "the newest is not guessed"
    assert runs_called("", ids) == runs_called("none", ids) == []


def test_runs_are_known_by_id_wherever_they_lie(tmp_path: Path) -> None:
    roots = [make("20260101-000000-a"), make("20260102-000000-b", Path("mine/b")), make("20260103-000000-c", tmp_path / "c")]
    assert [folder.resolve() for folder in known_runs().values()] == roots and len(run_folders()) == 3
    assert newest_run() == roots[2]
    NEWEST.symlink_to(roots[0])
    assert newest_run() == NEWEST and len(run_folders()) == 3, "the newest is one of them"
    for run_id, root in zip(known_runs(), roots, strict=True):
        assert to_type(open_run(root)) == run_id


@pytest.mark.parametrize("change", ["copied", "moved", "linked"])
def test_a_project_that_was_copied_or_moved_knows_its_own_runs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    make("20260101-000000-a")
    make("20260102-000000-b", Path("deep/er/b"))
    make("20260103-000000-c", Path("c"))
    other = tmp_path / "other"
    if change == "linked":
        other.symlink_to(project)
    else:
        (shutil.copytree if change == "copied" else shutil.move)(project, other)
    monkeypatch.chdir(other)
    here = other.resolve()
    assert {folder.resolve() for folder in known_runs().values()} == {here / RUNS / "20260101-000000-a", here / "deep/er/b", here / "c"}
    for run_id, folder in known_runs().items():
        assert to_type(open_run(folder)) == run_id


def test_a_run_of_another_project_is_named_by_its_folder(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, elsewhere = make("20260101-000000-a"), make("20260102-000000-b", tmp_path / "with space/b")
    monkeypatch.chdir(tmp_path)
    assert known_runs() == {}
    assert to_type(open_run(own)) == f"project/{RUNS}/20260101-000000-a"
    assert to_type(open_run(elsewhere)) == "'with space/b'"


def test_a_copied_folder_does_not_stand_for_the_run_whose_id_it_has() -> None:
    root = make("20260101-000000-z")
    copy = root.with_name("20260101-000000-a")
    shutil.copytree(root, copy)
    assert known_runs() == {"20260101-000000-z": RUNS / root.name} and len(run_folders()) == 2
    assert to_type(open_run(root)) == "20260101-000000-z" and to_type(open_run(copy)) == f"{RUNS}/{copy.name}"


@pytest.mark.parametrize("written", ['{"folder": 3}', '{"folder": ""}', '{"folder": "/"}', "{", "[]", '{"folder": "/nowhere/at/all"}'])
def test_metrics_without_a_run_locate_nothing(written: str) -> None:
    (METRICS / "20260101-000000-gone").mkdir(parents=True)
    (METRICS / "20260101-000000-gone/status.json").write_text(written)
    (METRICS / "a-file").write_text("")
    assert known_runs() == {} and newest_run() is None


def test_a_name_that_is_also_a_path_or_looks_like_an_option_is_typed_as_a_folder(tmp_path: Path) -> None:
    odd = make("-odd", tmp_path / "odd")
    assert to_type(open_run(odd)) == str(odd)
    root = make("mine", tmp_path / "mine")
    assert to_type(open_run(root)) == "mine"
    Path("mine").mkdir()
    assert to_type(open_run(root)) == str(root)
