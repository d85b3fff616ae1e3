"""A folder of the hub's cache means one snapshot, for models and for data, however many it holds."""

import json
import os
from pathlib import Path

import pytest
from tests.support.models import save_tiny

from llamahome.data.files.locate import locate
from llamahome.hub_cache import snapshot_in
from llamahome.model.load import find_model

OLD, NEW = "a" * 40, "b" * 40


def cached(folder: Path, *, main: str | None) -> Path:
    """Two snapshots; the first is the newer folder, as after a branch was fetched again by an older commit."""
    for age, commit in enumerate((OLD, NEW)):
        (folder / "snapshots" / commit).mkdir(parents=True)
        os.utime(folder / "snapshots" / commit, (1000 - age, 1000 - age))
    (folder / "refs").mkdir()
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.mark.parametrize(("main", "meant"), [(NEW, NEW), (OLD, OLD), (None, OLD), ("c" * 40, OLD)])
def test_the_branch_main_decides_and_else_the_newest(tmp_path: Path, main: str | None, meant: str) -> None:
    folder = cached(tmp_path / "models--me--mine", main=main)
    assert snapshot_in(folder) == folder / "snapshots" / meant


def test_no_other_folder_is_taken_for_a_cache(tmp_path: Path) -> None:
    assert snapshot_in(cached(tmp_path / "mine", main=NEW)) is None
    (tmp_path / "models--me--mine").mkdir()
    assert snapshot_in(tmp_path / "models--me--mine") is None


def test_rows_of_one_snapshot_are_read_and_that_is_said(tmp_path: Path) -> None:
    folder = cached(tmp_path / "datasets--me--mine", main=NEW)
    for commit in (OLD, NEW):
        (folder / "snapshots" / commit / "train.jsonl").write_text(json.dumps({"text": commit}) + "\n")
    said: list[str] = []
    assert locate(str(folder), say=said.append).files == (str(folder / "snapshots" / NEW / "train.jsonl"),)
    assert any(NEW[:12] in line for line in said)


def test_a_model_of_the_cache_is_its_snapshot(tmp_path: Path) -> None:
    folder = cached(tmp_path / "models--me--mine", main=NEW)
    save_tiny(folder / "snapshots" / NEW)
    said: list[str] = []
    assert find_model(str(folder), say=said.append) == folder / "snapshots" / NEW
    assert any(NEW[:12] in line for line in said)
