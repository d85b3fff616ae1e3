import io
import itertools
import math
import os
import pty
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from tests.support.summary import SUMMARY

from llamahome.monitoring.display import sparkline
from llamahome.monitoring.panel import PanelProgress, PanelState
from llamahome.monitoring.plain import PlainProgress
from llamahome.monitoring.progress import Progress, open_progress

METRICS = {
    "train/loss": 2.4031,
    "train/grad_norm": 0.53,
    "train/learning_rate": 9.8e-4,
    "train/tokens": 75648,
    "train/targets": 18155,
    "speed/tokens_per_s": 433.2,
    "speed/targets_per_s": 104.0,
    "speed/mfu": 0.33,
    "time/data": 0.01,
    "time/forward": 5.1,
    "time/backward": 8.4,
    "time/update": 0.12,
    "memory/rss": 3.1e9,
    "memory/peak": 3.3e9,
}


class FakeClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def report_run(progress: Progress, clock: FakeClock, *, steps: int = 36, seconds: float = 3.0) -> None:
    with progress.phase("data"):
        clock.seconds += 1.2
    progress.start(SUMMARY)
    for step in range(1, steps + 1):
        clock.seconds += seconds
        progress.update(step, METRICS)
        if step % 12 == 0:
            progress.evaluating(step)
            progress.evaluated(step, {"eval/loss": 2.75, "eval/perplexity": 15.6})
            progress.saved(step, Path(f"output/runs/x/checkpoint-{step}"))
    progress.finish(["done", "next: llamahome chat latest"])


def step_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step=")]


@settings(deadline=None, max_examples=25)
@given(seconds=st.floats(0.01, 30), steps=st.integers(1, 36))
def test_a_line_is_written_at_most_every_ten_seconds_and_for_the_first_and_the_last_step(seconds: float, steps: int) -> None:
    clock, stream = FakeClock(), io.StringIO()
    report_run(PlainProgress(stream, now=clock), clock, steps=steps, seconds=seconds)
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    shown = [int(line.split()[0].removeprefix("step=").split("/")[0]) for line in step_lines(text)]
    assert shown[0] == 1
    assert shown[-1] == steps
    assert shown == sorted(set(shown))
    gaps = [(after - before) * seconds for before, after in itertools.pairwise(shown)]
    assert all(gap >= 9.99 for gap in gaps[:-1])


def test_plain_lines_are_key_value_pairs_that_include_evaluations_and_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    clock, stream = FakeClock(), io.StringIO()
    report_run(PlainProgress(stream, phases=6, now=clock), clock)
    text = stream.getvalue()
    assert text.startswith("[1/6] data ... 1.2 s\nmodel: smollm2-135m-instruct, lora, 3.52% of the weights trained\n")
    for line in step_lines(text):
        assert all(part.count("=") == 1 for part in line.split(" "))
    assert (
        "step=1/36 loss=2.4031 grad_norm=0.5300 learning_rate=9.80e-04 tokens_per_s=433 rss=2.9GiB peak=3.1GiB elapsed=0:03 left=1:45"
        in text
    )
    assert "eval_step=12 eval_loss=2.7500" in text
    assert "saved=output/runs/x/checkpoint-36" in text
    out = capsys.readouterr()
    assert out.out == "done\nnext: llamahome chat latest\n"
    assert out.err == ""


def test_messages_within_a_phase_do_not_break_lines() -> None:
    clock, stream = FakeClock(), io.StringIO()
    progress = PlainProgress(stream, phases=2, now=clock)
    with progress.phase("model"):
        progress.say("converted\rin one pass\x1b[31m")
        progress.warn("no CUDA", "training runs on the CPU")
        clock.seconds += 75
    with pytest.raises(ValueError), progress.phase("train"):
        raise ValueError
    assert stream.getvalue().splitlines() == [
        "[1/2] model ...",
        "convertedin one pass[31m",
        "warning: no CUDA; training runs on the CPU",
        "[1/2] model ... 75.0 s",
        "[2/2] train ... failed after 0.0 s",
    ]


def test_the_start_of_an_evaluation_is_shown_unless_the_previous_one_was_short() -> None:
    clock, stream = FakeClock(), io.StringIO()
    progress, announced = PlainProgress(stream, now=clock), []
    progress.start(SUMMARY)
    progress.update(1, {"train/loss": 1.0})
    for step, seconds in ((4, 8.0), (8, 0.5), (12, 0.5), (16, 0.5)):
        start = len(stream.getvalue())
        progress.evaluating(step)
        clock.seconds += seconds
        announced.append(stream.getvalue()[start:])
        progress.evaluated(step, {"eval/loss": 2.75} if step != 8 else {})
    assert announced == ["evaluation after step 4 ...", "evaluation after step 8 ...", "", ""]
    progress.close()
    assert stream.getvalue().splitlines()[-3:] == [
        "evaluation after step 4 ... 8.0 s, held-out loss 2.7500",
        "evaluation after step 8 ... 0.5 s",
        "eval_step=16 eval_loss=2.7500",
    ]


def test_the_panel_shows_that_an_evaluation_is_running() -> None:
    panel = panel_after(steps=12)
    assert "evaluating" not in " ".join(draw(panel, 120))
    panel.evaluating = True
    assert "evaluating ..." in " ".join(draw(panel, 120))


def test_a_stream_that_is_no_terminal_gets_plain_lines_and_other_ranks_nothing() -> None:
    assert isinstance(open_progress(io.StringIO(), True), PlainProgress)
    assert type(open_progress(io.StringIO(), False)) is Progress


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = open_progress(io.StringIO(), False)
    report_run(progress, FakeClock())
    progress.warn("a", "b")
    progress.say("c")
    progress.close()
    assert capsys.readouterr() == ("", "")


def panel_after(*, steps: int, unicode: bool = True) -> PanelState:
    clock = FakeClock()
    panel = PanelState(SUMMARY, now=clock, unicode=unicode)
    for step in range(1, steps + 1):
        clock.seconds += 14
        panel.update(step, {**METRICS, "train/loss": 3.3 - 0.08 * step + 0.05 * math.sin(step)})
    if steps:
        panel.evaluation, panel.checkpoint = (8, {"eval/loss": 2.75}), "checkpoint-10"
    return panel


def draw(panel: PanelState, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(panel.draw())
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("steps", [0, 1, 12, 36])
def test_the_panel_fills_its_width_and_truncates_nothing(width: int, steps: int) -> None:
    lines = draw(panel_after(steps=steps), width)
    assert {cell_len(line) for line in lines} == {width}
    words = " ".join(" ".join(line.strip("│╭╰╮╯─ ").split()) for line in lines)
    assert "smollm2-135m-instruct, lora, 3.52% of the weights trained" in words
    assert "32 rows, 6,304 tokens, 2,048 at a time, 1 process" in words
    assert f"step {steps} of 36" in words
    assert "llamahome runs show 20261122-071405-brisk-otter" in words
    assert "Ctrl-C saves a checkpoint and stops" in words
    assert "…" not in words
    if steps:
        assert "held-out 2.7500 at step 8" in words
        assert "433 tokens/s, 33% of the peak: forward 37%, backward 62%, update 1%" in words
        assert "2.9 GiB now, 3.1 GiB at most" in words
        assert "gradient norm 0.530, learning rate 9.80e-04" in words


def test_at_eighty_columns_the_panel_has_about_ten_lines() -> None:
    assert len(draw(panel_after(steps=12), 80)) <= 14


def test_a_terminal_without_unicode_gets_a_panel_in_ascii() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80)
    console.print(panel_after(steps=12, unicode=False).draw())


def terminal_output(steps: int) -> str:
    reader, writer = pty.openpty()
    clock = FakeClock()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        progress = open_progress(stream, True, phases=2)
        assert isinstance(progress, PanelProgress)
        try:
            report_run(progress, clock, steps=steps)
            progress.close()
        finally:
            stream.flush()
            os.set_blocking(reader, False)
            text = b""
            while True:
                try:
                    text += os.read(reader, 65536)
                except OSError:
                    break
    os.close(reader)
    return text.decode()


def test_on_a_terminal_the_panel_is_drawn_and_the_cursor_left_visible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = terminal_output(3)
    assert "[1/2] data" in text
    assert "20261122-071405-brisk-otter" in text
    assert "step 3 of 36" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    assert capsys.readouterr().out == "done\nnext: llamahome chat latest\n"


def test_no_color_turns_colours_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    text = terminal_output(1)
    assert not [code for code in ("\x1b[3", "\x1b[4", "\x1b[9") if code in text.replace("\x1b[?25", "")]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream:
        assert isinstance(open_progress(stream, True), PlainProgress)
    os.close(reader)


@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300), width=st.integers(1, 80))
@settings(deadline=None, max_examples=60)
def test_a_sparkline_has_at_most_the_requested_width(values: list[float], width: int) -> None:
    finite = [value for value in values if math.isfinite(value)]
    assert len(sparkline(values, width=width)) == min(width, len(finite))


def test_a_sparkline_follows_its_values() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], width=8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0], width=8, unicode=False) == "=="


def test_a_closed_pipe_does_not_end_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        progress = PlainProgress(stream)
        progress.say("lost")
        with progress.phase("data"):
            progress.say("lost too")
        stream.write("closing the stream does not fail either")


def test_a_full_disk_behind_stderr_does_not_end_the_run() -> None:
    clock = FakeClock()
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as stream:
        report_run(PlainProgress(stream, now=clock), clock)
        with suppress(OSError):
            stream.close()
