import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.errors import UsageError
from llamahome.monitoring.report import report_run
from llamahome.monitoring.runs import describe_run, find_run, list_runs, numbers_of, read_records
from llamahome.rundir import open_run


@pytest.fixture(autouse=True)
def change_to_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(run_id: str, *, state: str | None = "finished", folder: Path | None = None, steps: int = 4, **status: Any) -> Path:
    root = folder or Path("output/runs") / run_id
    root.mkdir(parents=True)
    (root / "config.yaml").write_text("training:\n  batch_size: 8\n")
    (root / "run_id").write_text(run_id + "\n")
    metrics = Path("data/metrics/logs") / run_id
    metrics.mkdir(parents=True)
    records = [{"t": 1.0, "step": 0, "eval/loss": 3.5}]
    for step in range(1, steps + 1):
        records.append({"t": 1.0, "step": step, "train/loss": 4.0 - step / 2, "train/tokens": 100 * step, "train/targets": 20 * step})
        records[-1]["speed/tokens_per_s"] = 50.0
    records.append({"t": 2.0, "step": steps, "eval/loss": 2.5})
    (metrics / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if state is not None:
        record = {"state": state, "step": steps, "horizon": 8, "pid": os.getpid(), "host": socket.gethostname(), "t": time.time(), **status}
        (metrics / "status.json").write_text(json.dumps(record))
    return root


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 400))
def test_a_truncated_file_gives_its_complete_records(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    content = "".join(json.dumps({"t": 1.0, "step": step, "train/loss": None if step == 3 else 0.5}) + "\n" for step in range(8)).encode()
    path.write_bytes(content[:cut])
    series = numbers_of(read_records(path).records)
    assert [record["step"] for record in series] == list(range(content[:cut].count(b"\n")))
    assert all(math.isnan(record["train/loss"]) == (record["step"] == 3) for record in series)
    assert read_records(path).damaged == 0


def test_lines_that_cannot_be_parsed_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\x00garbage\n[1]\n{"step": 2}\n')
    series = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in series.records] == [1, 2]
    assert series.damaged == 2
    assert read_records(tmp_path / "nothing.jsonl").records == []


def test_a_run_is_described_from_its_files() -> None:
    make_run("20261122-071405-brisk-otter")
    (run,) = list_runs()
    assert (run.run_id, run.state, run.step, run.horizon) == ("20261122-071405-brisk-otter", "finished", 4, 8)
    assert (run.loss, run.eval_loss, run.tokens) == (2.0, 2.5, 400)
    assert run.folder == Path("output/runs/20261122-071405-brisk-otter")


@pytest.mark.parametrize("state", ["finished", "stopped", "failed", "running"])
def test_the_state_is_that_of_the_status_file_while_the_process_is_alive(state: str) -> None:
    assert describe_run(open_run(make_run("20260101-000000-a", state=state))).state == state


@pytest.mark.parametrize(("state", "reason", "early"), [
    ("finished", "finished", None),
    ("finished", "no gain", "no gain"),
    ("finished", "time is up", "time is up"),
    ("stopped", "asked to stop", None),
    ("running", "no gain", None),
    ("finished", ["odd"], None),
])  # fmt: skip
def test_a_finished_run_says_why_it_did_not_do_all_steps(state: str, reason: Any, early: str | None) -> None:
    assert describe_run(open_run(make_run("20260101-000000-a", state=state, reason=reason))).ended_early == early


def test_a_folder_that_came_without_its_metrics_is_as_far_as_its_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "came"
    (root / "checkpoint-12").mkdir(parents=True)
    (root / "config.yaml").touch()
    assert (describe_run(open_run(root)).state, describe_run(open_run(root)).step) == ("lost", 12)
    (root / "final").mkdir()
    assert (describe_run(open_run(root)).state, describe_run(open_run(root)).step) == ("finished", 12)


def test_a_run_whose_process_has_ended_is_lost_at_once() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert describe_run(open_run(make_run("20260101-000000-a", state="running", pid=ended.pid))).state == "lost"


def test_a_run_without_a_heartbeat_for_half_a_minute_is_lost() -> None:
    assert describe_run(open_run(make_run("20260101-000000-a", state="running", t=time.time() - 31))).state == "lost"


def test_a_run_on_another_machine_is_judged_by_its_heartbeat_alone() -> None:
    assert describe_run(open_run(make_run("20260101-000000-a", state="running", host="elsewhere", pid=2**22))).state == "running"


def test_a_run_without_a_status_is_lost() -> None:
    assert describe_run(open_run(make_run("20260101-000000-a", state=None))).state == "lost"


def test_runs_are_listed_oldest_first_including_those_in_other_folders() -> None:
    make_run("20260103-000000-c")
    make_run("20260101-000000-a")
    elsewhere = make_run("20260102-000000-mine", folder=Path("elsewhere/mine"))
    status = Path("data/metrics/logs/20260102-000000-mine/status.json")
    status.write_text(json.dumps({**json.loads(status.read_text()), "folder": str(elsewhere.resolve())}))
    assert [run.run_id for run in list_runs()] == ["20260101-000000-a", "20260102-000000-mine", "20260103-000000-c"]


def test_a_missing_folder_of_runs_is_an_empty_list() -> None:
    assert list_runs() == []


def test_a_run_is_found_by_id_by_part_by_folder_and_as_the_latest() -> None:
    make_run("20260101-000000-amber-finch")
    newest = make_run("20260102-000000-brisk-otter")
    (newest / "checkpoint-4").mkdir()
    for name in ("20260102-000000-brisk-otter", "otter", str(newest), str(newest / "checkpoint-4"), str(newest / "final"), "latest"):
        assert find_run(name).run_id == "20260102-000000-brisk-otter", name
    Path("output/training").symlink_to("runs/20260101-000000-amber-finch")
    assert find_run("latest").run_id == "20260101-000000-amber-finch"
    assert find_run("output/training").run_id == "20260101-000000-amber-finch"


@pytest.mark.parametrize(("name", "code", "hint"), [
    ("brisk-oter", "run.unknown", "llamahome runs show 20260102-000000-brisk-otter"),
    ("20260102-000000-brisk-ottr", "run.unknown", "llamahome runs show 20260102-000000-brisk-otter"),
    ("zzzzzz", "run.unknown", "llamahome runs list"),
    ("2026", "run.ambiguous", "llamahome runs show 20260102-000000-brisk-otter"),
])  # fmt: skip
def test_an_unknown_name_gets_the_nearest_run_as_a_hint(name: str, code: str, hint: str) -> None:
    make_run("20260101-000000-amber-finch")
    make_run("20260102-000000-brisk-otter")
    with pytest.raises(UsageError) as caught:
        find_run(name)
    assert (caught.value.problems[0].code, caught.value.problems[0].hint) == (code, hint)


def test_the_hint_is_the_command_that_was_typed_with_the_newest_matching_run() -> None:
    for run_id in ("20260101-000000-amber-finch", "20260102-000000-brisk-otter", "20260103-000000-late-otter"):
        make_run(run_id)
    for name, typed, hint in (
        ("otter", ("compare", "amber", "otter"), "llamahome runs compare amber 20260103-000000-late-otter"),
        ("otter", ("tail",), "llamahome runs tail 20260103-000000-late-otter"),
        ("o", ("show", "o"), "llamahome runs show 20260103-000000-late-otter"),
        ("late-ottr", ("compare", "amber", "late-ottr"), "llamahome runs compare amber 20260103-000000-late-otter"),
        ("amber-fnch", ("report",), "llamahome runs report 20260101-000000-amber-finch"),
    ):
        with pytest.raises(UsageError) as caught:
            find_run(name, typed=typed)
        assert caught.value.problems[0].hint == hint


def test_of_many_matching_runs_the_newest_ten_are_shown_newest_first() -> None:
    for day in range(1, 14):
        make_run(f"202601{day:02}-000000-amber-finch")
    with pytest.raises(UsageError) as caught:
        find_run("amber")
    (problem,) = caught.value.problems
    assert problem.excerpt.splitlines() == [f"202601{day:02}-000000-amber-finch" for day in range(13, 3, -1)]
    assert "13 run ids" in problem.message and problem.hint.endswith("20260113-000000-amber-finch")


def test_latest_without_any_run_is_an_error_that_shows_how_to_start_one() -> None:
    with pytest.raises(UsageError, match="llamahome train"):
        find_run("latest")


def test_a_report_gathers_settings_losses_evaluations_and_time() -> None:
    root = make_run("20260101-000000-a")
    (root / "checkpoint-4").mkdir()
    (root / "final").mkdir()
    report = report_run(open_run(root))
    assert report.changed_settings == {"training.batch_size": 8}
    assert [point.value for point in report.losses] == [3.5, 3.0, 2.5, 2.0]
    assert [record["eval/loss"] for record in report.evaluations] == [3.5, 2.5]
    assert report.best is not None
    assert (report.best.step, report.best.value) == (4, 2.5)
    assert (report.tokens, report.targets) == (400, 80)
    assert report.training_seconds == pytest.approx(8.0)
    assert [step for step, _ in report.checkpoints] == [4]
    assert report.final is not None


def test_a_run_without_a_step_has_an_empty_report() -> None:
    root = Path("output/runs/20260101-000000-a")
    root.mkdir(parents=True)
    (root / "config.yaml").write_text("no_such_section: {a: 1}\n")
    report = report_run(open_run(root))
    assert report.losses == []
    assert report.best is None
    assert report.settings_problem is not None


def test_ten_thousand_evaluations_are_judged_once() -> None:
    metrics = Path("data/metrics/logs") / make_run("many", steps=2).name / "metrics.jsonl"
    with metrics.open("a") as file:
        file.writelines(json.dumps({"t": 3.0, "step": step, "eval/loss": 2 + 1 / step}) + "\n" for step in range(3, 10_000))
    report = report_run(open_run(Path("output/runs/many")))
    assert report.best is report.best and report.best is not None and report.best.step == 9_999
