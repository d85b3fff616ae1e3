import os
from datetime import datetime
from pathlib import Path

import pytest

from llamahome.errors import ConfigError, MachineError
from llamahome.rundir import (
    RAW_DATA,
    RUNS,
    as_typed,
    create_run,
    first_command,
    new_run_id,
    open_run,
    point_newest_to,
    refuse_used,
)


@pytest.fixture(autouse=True)
def _in_a_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_opened_again_has_the_paths_it_was_made_with():
    made = create_run(Path("elsewhere/mine"), "first try")
    opened = open_run(Path("elsewhere/mine"))
    assert opened.run_id == made.run_id
    assert opened.metrics_dir == made.metrics_dir
    assert opened.root == made.root.resolve()


def test_metrics_are_those_of_the_project_around_the_run_from_any_folder(tmp_path, monkeypatch):
    run = create_run(None, "otter")
    run.metrics_dir.mkdir(parents=True)
    assert run.metrics_dir == Path("data/metrics/logs") / run.run_id
    there = run.root.resolve()
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert open_run(there).metrics_dir == there.parents[2] / "data/metrics/logs" / run.run_id
    (tmp_path / "else").rmdir()
    assert open_run(there).metrics_dir == Path("data/metrics/logs") / run.run_id, "the working folder has been removed"


def test_a_folder_without_a_record_is_a_run_of_its_own_name(tmp_path):
    (tmp_path / "old-run").mkdir()
    assert open_run(tmp_path / "old-run").run_id == "old-run"


def test_two_runs_of_one_name_in_one_second_get_two_folders():
    runs = [create_run(None, "same") for _ in range(4)]
    assert len({run.root for run in runs}) == 4
    assert all(run.root.name == run.run_id and run.root.parent == RUNS for run in runs)


def test_a_folder_that_holds_a_run_is_refused_with_the_command_that_resumes_it(tmp_path):
    run = create_run(tmp_path / "out", None)
    run.config.write_text("training: {}\n")
    with pytest.raises(ConfigError) as caught:
        create_run(tmp_path / "out", None)
    assert caught.value.problems[0].code == "output.holds-a-run"
    assert "train-resume" in caught.value.problems[0].hint


def test_a_folder_that_is_not_empty_and_a_file_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, code in (("full", "output.not-empty"), ("file", "output.not-a-folder")):
        with pytest.raises(ConfigError) as caught:
            refuse_used(tmp_path / name)
        assert caught.value.problems[0].code == code
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_a_folder_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError) as caught:
        create_run(tmp_path / "file" / "run", None)
    assert caught.value.problems[0].code == "machine.output-not-writable"


def test_checkpoints_are_listed_by_number_and_unfinished_ones_are_not(tmp_path):
    run = create_run(tmp_path / "out", None)
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20.tmp", "final", ".trash-checkpoint-3"):
        (run.root / name).mkdir()
    (run.root / "checkpoint-7").write_text("a file")
    assert [step for step, _ in run.checkpoints()] == [9, 100]


def test_the_link_follows_the_newest_run_and_leaves_a_real_folder_alone(tmp_path):
    for name in ("one", "two"):
        run = create_run(None, name)
        point_newest_to(run.root)
        assert Path("output/training").resolve() == run.root.resolve()
    assert not Path(os.readlink("output/training")).is_absolute()
    Path("output/training").unlink()
    Path("output/training").mkdir()
    point_newest_to(run.root)
    assert not Path("output/training").is_symlink()


def test_a_run_id_is_date_time_and_a_name_that_any_file_system_takes():
    now = datetime(2026, 11, 22, 7, 14, 5)
    assert new_run_id("My run: #1/2", now=now) == "20261122-071405-My-run-1-2"
    assert new_run_id("...", now=now).startswith("20261122-071405-")
    assert len(new_run_id(None, now=now).split("-")) == 4


def test_the_remedy_for_a_taken_output_is_a_folder_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("x")
    Path("my run").mkdir()
    Path("my run", "a").write_text("x")
    Path("my run-2").mkdir()
    Path("v1.5").mkdir()
    Path("v1.5", "a").write_text("x")
    for taken, free in (("notes.txt", "notes-2"), ("my run", "'my run-3'"), ("v1.5", "v1.5-2")):
        with pytest.raises(ConfigError) as caught:
            refuse_used(Path(taken))
        assert caught.value.problems[0].hint == f"--output {free}"


def test_where_no_run_is_yet_the_command_writes_rows_only_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert first_command() == "llamahome data sample data/training/raw && llamahome train data/training/raw"
    RAW_DATA.mkdir(parents=True)
    (RAW_DATA / ".gitkeep").touch()
    assert "sample" in first_command()
    (RAW_DATA / "mine.jsonl").write_text("{}")
    assert first_command() == "llamahome train data/training/raw"


@pytest.mark.parametrize(
    ("name", "typed"), [("run", "run"), ("my run", "'my run'"), ("-run", "./-run"), ("-my run", "'./-my run'"), ("a/-b", "a/-b")]
)
def test_a_path_is_printed_as_a_command_takes_it(name: str, typed: str):
    assert as_typed(Path(name)) == typed
