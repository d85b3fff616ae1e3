"""What stays of a run where there is no terminal: a short log without carriage returns; alerts are in it, in the panel and in notebooks."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.support.summary import SUMMARY

from llamahome.monitoring.notebook import NotebookProgress
from llamahome.monitoring.panel import PanelProgress
from llamahome.monitoring.plain import PlainProgress
from llamahome.monitoring.progress import Progress

METRICS = {
    "train/loss": 2.4031,
    "train/grad_norm": 0.53,
    "train/learning_rate": 9.8e-4,
    "speed/tokens_per_s": 433.2,
    "memory/rss": 3.1e9,
    "memory/peak": 3.3e9,
}
ALERT = (7, "97% of the memory is in use", "smaller passes: --set training.micro_batch_tokens=2048")


@pytest.mark.parametrize("seconds", [0.05, 1.0, 11.0, 60.0])
def test_the_log_of_10_000_steps_is_under_a_megabyte_without_carriage_returns(seconds: float) -> None:
    now, stream = [0.0], io.StringIO()
    progress = PlainProgress(stream, now=lambda: now[0])
    progress.start(replace(SUMMARY, horizon=10_000))
    for step in range(1, 10_001):
        now[0] += seconds
        progress.update(step, METRICS)
        if step % 100 == 0:
            progress.evaluating(step)
            now[0] += 12
            progress.evaluated(step, {"eval/loss": 2.75, "eval/perplexity": 15.6, "eval/token_accuracy": 0.4})
            progress.saved(step, Path(f"output/runs/20261129-120000-brisk-otter/checkpoint-{step}"))
            progress.alert(*ALERT)
    progress.close()
    text = stream.getvalue()
    assert 10_000 < len(text.encode()) < 1_000_000
    assert "\r" not in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) < 400


def test_an_alert_is_one_line_in_a_log_also_between_two_lines_of_metrics() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, now=lambda: 0.0)
    progress.evaluating(7)
    progress.alert(7, "x\rx", "y")
    progress.alert(*ALERT)
    expected = ["evaluation after step 7 ...", "alert: step 7: xx; y", f"alert: step 7: {ALERT[1]}; {ALERT[2]}"]
    assert stream.getvalue().splitlines() == expected


def test_an_alert_stands_above_the_panel_and_in_it() -> None:
    stream = io.StringIO()
    progress = PanelProgress(stream, console=Console(file=stream, width=160, force_terminal=True, color_system=None))
    progress.start(SUMMARY)
    progress.alert(*ALERT)
    progress.alert(9, "the disk is full", "free some")
    progress.close()
    shown = stream.getvalue()
    assert f"alert: step 7: {ALERT[1]}; {ALERT[2]}" in shown
    assert "2, newest: step 9: the disk is full" in shown


def test_a_notebook_shows_alerts_and_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    texts: list[str] = []
    progress = NotebookProgress(lambda data, name, replace: texts.append(data["text/plain"]))
    progress.start(SUMMARY)
    progress.alert(*ALERT)
    assert ALERT[2] in texts[-1] and f"1, newest: step 7: {ALERT[1]}" in texts[-1]
    Progress().alert(*ALERT)
    assert capsys.readouterr() == ("", "")
