"""Every reader of a run, the commands and the dashboard, stands files that hold any JSON, are cut, or cannot be read at all."""

import contextlib
import io
import json
import math
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.support.written_runs import append_line, metrics_of, write_run

from llamahome.cli import runs as commands
from llamahome.cli.runs_compare import _lines as compared
from llamahome.dashboard.app import make_app
from llamahome.monitoring.charts.page import page, write_report
from llamahome.monitoring.compare import as_json
from llamahome.monitoring.follow import Files, Follower, records_of
from llamahome.monitoring.panel import PanelProgress
from llamahome.monitoring.plain import PlainProgress
from llamahome.monitoring.report import report_run
from llamahome.monitoring.runs import describe_run, list_runs, without_nan
from llamahome.rundir import RunPaths, open_run
from llamahome.web.access import Access

RUN_ID, OTHER = "20260101-000000-amber-finch", "20260102-000000-brisk-otter"
ODD: list[Any] = [
    None,
    True,
    -1,
    1.5,
    1e308,
    math.nan,
    math.inf,
    10**400,
    2**63,
    "",
    "x",
    "\ud800",
    [1],
    {},
    {"a": []},
    "../../etc",
    "a\0b",
]
NAMES = (
    "metrics.jsonl",
    "events.jsonl",
    "samples.jsonl",
    "system.jsonl",
    "status.json",
    "summary.json",
    "environment.json",
    "lineage.json",
)
CURVES = "train/loss,eval/loss,plan/learning_rate,plan/memory,time/forward,memory/rss"
PAGES = (
    "/",
    "/api/runs",
    f"/run/{RUN_ID}",
    f"/run/{RUN_ID}/samples",
    f"/run/{RUN_ID}/system",
    f"/run/{RUN_ID}/data",
    f"/compare?run={RUN_ID}&run={OTHER}",
    *(f"/api/run/{RUN_ID}/curves?names={CURVES}&x={axis}&smooth=0.5" for axis in ("step", "tokens", "time")),
    f"/api/run/{RUN_ID}/curves?names=system/cpu&machine=1&x=step",
    f"/api/run/{RUN_ID}/marks?x=time",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.chdir(tmp_path)
    paths = write_run(RUN_ID, steps=12, state="running")
    write_run(OTHER, steps=6)
    append_line(paths.metrics_dir / "events.jsonl", {"t": 1.0, "kind": "alert", "event": "alert", "step": 3, "text": "a", "help": "b"})
    append_line(paths.metrics_dir / "system.jsonl", {"t": metrics_of(2)["t"], "system/cpu": 0.5})
    (paths.lineage).write_text(json.dumps([{"path": "out/final", "run": "a", "sha256": "0"}]))
    schedule = {"peak": 1e-3, "horizon": 12, "shape": "cosine", "warmup": 1, "begin": 1, "height": 1.0}
    (paths.checkpoint(12) / "trainer_state.json").write_text(json.dumps({"extra": {"schedule": schedule, "data_path": ["a"]}}))
    return paths


def read_by_everything(paths: RunPaths) -> None:
    """Raises whatever a reader raises."""
    infos = list_runs()
    commands._table(infos)
    report, other = report_run(paths), report_run(open_run(Path("output/runs") / OTHER))
    commands._report_rows(report)
    for value in (commands._report_json(report), [commands._info_json(info) for info in infos], as_json([report, other])):
        json.dumps(without_nan(value), allow_nan=False)
    page(paths)
    compared([report, other])
    json.dumps(list(records_of(Files(paths))))
    for plain in (True, False):
        follow(paths, plain=plain)
    client = TestClient(make_app(Access("127.0.0.1", 8700), threading.Event()), base_url="http://127.0.0.1:8700")
    for address in PAGES:
        assert client.get(address).status_code < 500, address


def follow(paths: RunPaths, *, plain: bool) -> None:
    stream = io.StringIO()
    panel = lambda clock: PanelProgress(stream, now=clock, hints=[])  # noqa: E731
    follower = Follower(paths, (lambda clock: PlainProgress(stream, now=clock)) if plain else panel, plain=plain)
    try:
        info = follower.poll()
        follower.is_over(info)
        with contextlib.redirect_stdout(io.StringIO()):
            follower.finish(info)
    finally:
        follower.close()


def with_odd_values(record: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return {name: chance.choice(ODD) if chance.random() < 0.3 else value for name, value in record.items()}


def path_of(paths: RunPaths, name: str) -> Path:
    return paths.root / name if name in ("environment.json", "lineage.json") else paths.metrics_dir / name


@pytest.mark.parametrize("name", NAMES)
def test_any_json_value_in_any_field_is_stood(run: RunPaths, name: str) -> None:
    path, chance = path_of(run, name), random.Random(name)
    for _ in range(2):
        lines = path.read_text().splitlines()
        changed = []
        for line in lines:
            found = json.loads(line)
            ones = [with_odd_values(each, chance) for each in found] if isinstance(found, list) else with_odd_values(found, chance)
            changed.append(json.dumps(ones))
        path.write_text("\n".join(changed) + "\n")
        read_by_everything(run)
        path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", [*NAMES, "config.yaml", "run_id"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "folder", "noise"])
def test_a_file_that_is_cut_gone_or_no_file_is_stood(run: RunPaths, name: str, damage: str) -> None:
    path = path_of(run, name) if name in NAMES else run.root / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": random.Random(0).randbytes(300)}[damage])
    read_by_everything(run)


@pytest.mark.parametrize("written", ["", "\n", "..", "a/b", "../../../etc", "a\nb"])
def test_an_id_that_names_no_folder_of_metrics_is_not_taken(run: RunPaths, written: str) -> None:
    (run.root / "run_id").write_text(written)
    assert open_run(run.root).run_id == RUN_ID


def test_a_name_that_is_no_utf_8_is_shown_escaped(run: RunPaths) -> None:
    environment = json.loads(run.environment.read_text())
    run.environment.write_text(json.dumps({**environment, "command": ["x", "train", "caf\udce9.jsonl"]}))
    assert "caf\\udce9.jsonl" in write_report(run).read_text(encoding="utf-8")
    read_by_everything(run)


def test_the_last_evaluation_is_found_however_long_ago_it_was(run: RunPaths) -> None:
    with (run.metrics_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(metrics_of(step)) + "\n" for step in range(13, 3000))
    info = describe_run(run)
    assert info.step == 2999 and info.eval_loss == report_run(run).evaluations[-1]["eval/loss"]


@pytest.mark.parametrize("axis", ["step", "time"])
def test_no_curve_goes_back_when_the_clock_is_set_back(run: RunPaths, axis: str) -> None:
    records = [{**metrics_of(step), "t": metrics_of(step)["t"] - (3600 if step > 4 else 0)} for step in range(1, 9)]
    (run.metrics_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    client = TestClient(make_app(Access("127.0.0.1", 8700), threading.Event()), base_url="http://127.0.0.1:8700")
    places = client.get(f"/api/run/{RUN_ID}/curves?names=train/loss&x={axis}").json()["lines"]["train/loss"]["x"]
    assert places == sorted(places) and places[0] >= 0 and len(places) == 8


@pytest.mark.parametrize(
    ("metrics", "titles"),
    [
        ({"train/reward": 0.5, "train/reward_std": 0.1, "train/answer_tokens": 7.0, "time/rollout": 2.0}, ("Reward", "Length of answers")),
        ({"train/pair_accuracy": 0.5, "train/chosen_logprob": -2.0}, ("Judged rightly", "Log-probability of answers")),
        ({"train/answer_accuracy": 0.5, "train/good_reward": 0.1}, ("Judged rightly", "Rewards of answers")),
    ],
)
def test_what_an_objective_measures_has_charts_everywhere(run: RunPaths, metrics: dict[str, float], titles: tuple[str, ...]) -> None:
    records = [{**metrics_of(step), **metrics} for step in range(1, 9)]
    (run.metrics_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    client = TestClient(make_app(Access("127.0.0.1", 8700), threading.Event()), base_url="http://127.0.0.1:8700")
    shown = client.get(f"/run/{RUN_ID}").text
    for title in titles:
        assert f"<h3>{title}</h3>" in shown
    for name in metrics:
        assert f"&#34;{name}&#34;" in shown, name
    assert f"<h3>{titles[0]}</h3>" in client.get(f"/compare?run={RUN_ID}&run={OTHER}").text
    assert f"<h3>{titles[0]}</h3>" in page(run)
