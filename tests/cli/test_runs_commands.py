import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from llamahome.cli.runs import runs_app
from llamahome.errors import UsageError
from llamahome.monitoring.recorder import Recorder
from llamahome.rundir import RUNS, RunPaths, point_newest_to


@pytest.fixture(autouse=True)
def change_to_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recorded_run(run_id: str, *, steps: int = 6) -> RunPaths:
    paths = RunPaths(RUNS / run_id, run_id)
    paths.root.mkdir(parents=True)
    paths.config.write_text("training:\n  batch_size: 8  # --set\n  epochs: 0.5\nlora:\n  target_modules: [q_proj, v_proj]\n")
    point_newest_to(paths.root)
    recorder = Recorder(
        paths.metrics_dir, tensorboard_dir=None, is_main=True, resume_step=None, flops_per_token=1.0, peak_flops=None, warn=pytest.fail
    )
    recorder.status("running", 0, steps)
    recorder.log(0, {"eval/loss": 3.3, "eval/perplexity": 27.1, "eval/token_accuracy": 0.4})
    for step in range(1, steps + 1):
        loss = torch.tensor(float("nan") if step == 2 else 3.5 - step / 4)
        recorder.record(step, loss=loss, grad_norm=torch.tensor(1.0), learning_rate=1e-3, tokens=1000, targets=250)
        window = recorder.cut(step)
        assert window is not None
        recorder.write(window, {"forward": 1.0, "backward": 1.0})
    recorder.log(steps, {"eval/loss": 2.8, "eval/perplexity": 16.4, "eval/token_accuracy": 0.5})
    paths.checkpoint(steps).mkdir()
    paths.final.mkdir()
    recorder.event("saved", step=steps)
    recorder.status("finished", steps, steps)
    recorder.close()
    return paths


def run(*words: str) -> str:
    result = CliRunner().invoke(runs_app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def strict(text: str) -> Any:
    def refuse(word: str) -> float:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_list_without_runs_shows_how_to_start_one() -> None:
    assert "llamahome train" in run("list")
    assert strict(run("list", "--json")) == []


def test_list_shows_a_line_per_run() -> None:
    recorded_run("20260101-000000-amber-finch")
    recorded_run("20260102-000000-brisk-otter", steps=3)
    lines = run("list").splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:6] == ["20260101-000000-amber-finch", "finished", "6/6", "2.0000", "2.8000", "6,000"]
    assert [entry["run_id"] for entry in strict(run("list", "--json"))] == ["20260101-000000-amber-finch", "20260102-000000-brisk-otter"]


def test_show_prints_settings_losses_evaluations_and_files() -> None:
    recorded_run("20260101-000000-amber-finch")
    text = run("show", "latest")
    for words in (
        "finished, 6 of 6 steps",
        "training.batch_size: 8",
        "training.epochs: 0.5",
        'lora.target_modules: ["q_proj", "v_proj"]',
        "first 3.2500 at step 1, last 2.0000 at step 6, lowest 2.0000 at step 6",
        "step 0: loss 3.3000, perplexity 27.1000, token accuracy 0.4000",
        "step 6: loss 2.8000, perplexity 16.4000, token accuracy 0.5000 (best)",
        "6,000, of which 1,500 learned",
        "saved 1",
        "output/runs/20260101-000000-amber-finch/checkpoint-6",
        "output/runs/20260101-000000-amber-finch/final",
        "data/metrics/logs/20260101-000000-amber-finch",
    ):
        assert words in text, words


def test_show_as_json_is_strict_json() -> None:
    recorded_run("20260101-000000-amber-finch")
    shown = strict(run("show", "finch", "--json"))
    assert shown["settings"] == {"training.batch_size": 8, "training.epochs": 0.5, "lora.target_modules": ["q_proj", "v_proj"]}
    assert shown["losses"][1] == [2, None]
    assert shown["loss_points"]["best_evaluation"] == {"step": 6, "value": 2.8}
    assert shown["checkpoints"] == [{"step": 6, "path": "output/runs/20260101-000000-amber-finch/checkpoint-6"}]


def test_show_of_an_unknown_run_is_a_usage_error() -> None:
    recorded_run("20260101-000000-amber-finch")
    with pytest.raises(UsageError, match="llamahome runs show 20260101-000000-amber-finch"):
        run("show", "amber-fich")


def test_the_commands_import_no_torch() -> None:
    recorded_run("20260101-000000-amber-finch")
    code = (
        "import sys; from click.testing import CliRunner; from llamahome.cli.runs import runs_app\n"
        "for words in ('list', 'show latest', 'tail', 'compare latest latest', 'report latest'):\n"
        "    assert CliRunner().invoke(runs_app, words.split()).exit_code == 0, words\n"
        "heavy = {'torch', 'transformers', 'tensorboard', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_was_started_without_streams_ends_as_usual() -> None:
    """As from some daemons and cron jobs."""
    recorded_run("20260101-000000-brisk-otter")
    for words, status in (("runs show otter", 0), ("runs list", 0), ("runs show badger", 2)):
        command = f"exec {sys.executable} -m llamahome {words} >&- 2>&- <&-"
        assert subprocess.run(["sh", "-c", command], check=False).returncode == status, words


def test_a_run_whose_metrics_are_elsewhere_is_not_called_one_without_a_step() -> None:
    paths = recorded_run("20260101-000000-brisk-otter")
    shutil.rmtree(paths.metrics_dir)
    shown = run("show", "otter")
    assert "unknown: the metrics of this run are not in data/metrics/logs" in shown and "no step" not in shown
    paths.checkpoint(6).rmdir()
    assert "no step has been done" in run("show", "otter")
