"""The runs that the dashboard knows: each id once, and the folder that its id belongs to."""

import shutil
from pathlib import Path

import pytest
from tests.support.dashboards import RUN_ID, write_run

from llamahome.dashboard.library import Library
from llamahome.rundir import RUNS


def test_a_copy_of_a_run_s_folder_does_not_take_the_place_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    for name in ("a-copy", "zz-copy"):
        shutil.copytree(RUNS / RUN_ID, RUNS / name)
    library = Library()
    assert {run_id: paths.root for run_id, paths in library.runs().items()} == {RUN_ID: (RUNS / RUN_ID).resolve()}
    assert [info.run_id for info in library.infos()] == [RUN_ID]
