"""`runs compare`: only what differs, results side by side, and curves on one scale."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.support.written_runs import write_run

from llamahome.cli.runs import runs_app
from llamahome.monitoring.compare import curve_lines, differing_settings, figure_rows
from llamahome.monitoring.report import report_run

FINCH, OTTER = "20260101-000000-amber-finch", "20260102-000000-brisk-otter"


@pytest.fixture(autouse=True)
def change_to_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def typed(*words: str) -> Result:
    return CliRunner().invoke(runs_app, ["compare", *words])


def compared(*words: str) -> Any:
    result = typed(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_only_settings_that_differ_are_shown_with_where_they_came_from() -> None:
    write_run(FINCH, batch_size=8, learning_rate=0.001)
    write_run(OTTER, batch_size=16, learning_rate=0.001)
    assert compared("finch", "otter")["settings"] == {
        "training.batch_size": {FINCH: {"value": 8, "origin": "--set"}, OTTER: {"value": 16, "origin": "--set"}}
    }
    text = typed("finch", "otter").stdout
    assert "training.batch_size  8 (--set)" in text and "learning_rate" not in text


def test_a_resolved_auto_is_marked_as_one() -> None:
    reports = [report_run(write_run(FINCH, learning_rate=0.001)), report_run(write_run(OTTER, learning_rate=0.002))]
    (differing,) = differing_settings(reports)
    assert (differing.key, differing.shown()) == ("training.learning_rate", ["0.001 (auto)", "0.002 (auto)"])


def test_results_stand_side_by_side() -> None:
    write_run(FINCH, steps=40)
    write_run(OTTER, steps=80, state="stopped", losses={80: None})
    finch, otter = compared("finch", "otter")["runs"]
    assert (finch["state"], finch["steps"], finch["best_evaluation"]) == ("finished", 40, {"step": 20, "value": 1.8})
    assert (otter["state"], otter["steps"], otter["last_loss"], otter["tokens_per_s"]) == ("stopped", 80, None, 480.0)
    assert (finch["training_seconds"], otter["training_seconds"]) == (80.0, 160.0)
    lines = typed("finch", "otter").stdout.splitlines()
    (best,) = [line for line in lines if line.startswith("best evaluation")]
    assert best.split()[2:] == ["1.8000", "at", "step", "20", "1.8000", "at", "step", "40"]


def test_curves_share_one_scale_of_steps_and_values() -> None:
    high, low = write_run(FINCH, steps=40), write_run(OTTER, steps=80, losses=dict.fromkeys(range(1, 81), 0.5))
    drawn = curve_lines([report_run(high), report_run(low)], "train/loss", width=40, unicode=False)
    assert drawn is not None
    scale, first, second = drawn
    assert scale.endswith("over 80 steps") and scale.startswith("0.5 to 2.")
    assert (len(first), first[0], second) == (21, "@", "_" * 40)


def test_a_spike_does_not_press_the_other_bars_flat() -> None:
    paths = write_run(FINCH, steps=400, losses={200: 5000.0})
    drawn = curve_lines([report_run(paths)], "train/loss", width=40, unicode=False)
    assert drawn is not None and len(set(drawn[1])) > 3


def test_a_run_whose_files_are_damaged_is_compared_with_what_is_left() -> None:
    write_run(FINCH)
    broken = write_run(OTTER, batch_size=16)
    broken.config.write_text("training: [\n")
    file = broken.metrics_dir / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:3000] + b"\n{{{\n")
    text = typed("finch", "otter").stdout
    assert "settings of B cannot be read" in text and "2 lines of metrics.jsonl of B cannot be read" in text
    assert "settings: the same in all of them, or unknown" in text
    assert compared("finch", "otter")["settings"] == {}


def test_a_run_without_metrics_is_no_obstacle() -> None:
    write_run(FINCH)
    empty = write_run(OTTER)
    (empty.metrics_dir / "metrics.jsonl").unlink()
    assert compared("finch", "otter")["runs"][1]["last_loss"] is None
    assert typed("finch", "otter").exit_code == 0


def test_one_run_alone_is_refused() -> None:
    write_run(FINCH)
    result = typed("finch")
    assert result.exit_code == 2 and "takes 2 to 26 runs, not 1" in result.output


def test_a_spike_is_in_the_curves_of_the_json() -> None:
    write_run(FINCH, steps=2000, losses={777: 99.0})
    write_run(OTTER)
    curve = compared("finch", "otter")["curves"][FINCH]["train/loss"]
    assert [777, 99.0] in curve and len(curve) < 600


def test_runs_that_learned_from_pairs_are_compared_by_the_pairs_they_get_right() -> None:
    report = report_run(write_run(FINCH))
    of_pairs = replace(report, evaluations=[{"step": 20, "eval/loss": 0.5, "eval/pair_accuracy": 0.75}])
    rows = dict(figure_rows([of_pairs, report]))
    assert rows["last pair accuracy"] == ["0.7500 at step 20", "-"]
    assert "last pair accuracy" not in dict(figure_rows([report]))
