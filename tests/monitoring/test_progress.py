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

from llamahome.monitoring.panel import Board, PanelProgress
from llamahome.monitoring.plain import PlainProgress
from llamahome.monitoring.progress import Progress, QuietProgress, RunSummary, open_progress
from llamahome.monitoring.sparkline import sparkline

SUMMARY = RunSummary(
    run_id="20261122-071405-brisk-otter",
    model="smollm2-135m-instruct",
    method="lora",
    trained_share=0.0352,
    train_rows=368,
    eval_rows=32,
    mean_tokens=197.2,
    target_share=0.24,
    batch_size=32,
    tokens_per_step=6304,
    micro_batch_tokens=2048,
    processes=1,
    horizon=36,
    epochs=3,
    folder="output/runs/20261122-071405-brisk-otter",
)
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


class Watch:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def whole_run(progress: Progress, watch: Watch, *, steps: int = 36, seconds: float = 3.0) -> None:
    with progress.phase("data"):
        watch.seconds += 1.2
    progress.start(SUMMARY)
    for step in range(1, steps + 1):
        watch.seconds += seconds
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
def test_a_line_comes_at_most_every_ten_seconds_and_the_first_and_last_step_always(seconds: float, steps: int) -> None:
    watch, stream = Watch(), io.StringIO()
    whole_run(PlainProgress(stream, now=watch), watch, steps=steps, seconds=seconds)
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    shown = [int(line.split()[0].removeprefix("step=").split("/")[0]) for line in step_lines(text)]
    assert shown[0] == 1
    assert shown[-1] == steps
    assert shown == sorted(set(shown))
    gaps = [(after - before) * seconds for before, after in itertools.pairwise(shown)]
    assert all(gap >= 9.99 for gap in gaps[:-1])


def test_plain_lines_are_key_value_pairs_that_fold_evaluations_in(capsys: pytest.CaptureFixture[str]) -> None:
    watch, stream = Watch(), io.StringIO()
    whole_run(PlainProgress(stream, phases=6, now=watch), watch)
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


def test_what_is_said_in_a_phase_keeps_lines_whole() -> None:
    watch, stream = Watch(), io.StringIO()
    progress = PlainProgress(stream, phases=2, now=watch)
    with progress.phase("model"):
        progress.say("converted\rin one pass\x1b[31m")
        progress.warn("no CUDA", "training runs on the CPU")
        watch.seconds += 75
    with pytest.raises(ValueError), progress.phase("train"):
        raise ValueError
    assert stream.getvalue().splitlines() == [
        "[1/2] model ...",
        "convertedin one pass[31m",
        "warning: no CUDA; training runs on the CPU",
        "[1/2] model ... 75.0 s",
        "[2/2] train ... failed after 0.0 s",
    ]


def test_an_evaluation_is_told_when_it_begins_unless_the_last_one_was_short() -> None:
    watch, stream = Watch(), io.StringIO()
    progress, told = PlainProgress(stream, now=watch), []
    progress.start(SUMMARY)
    progress.update(1, {"train/loss": 1.0})
    for step, seconds in ((4, 8.0), (8, 0.5), (12, 0.5), (16, 0.5)):
        began = len(stream.getvalue())
        progress.evaluating(step)
        watch.seconds += seconds
        told.append(stream.getvalue()[began:])
        progress.evaluated(step, {"eval/loss": 2.75} if step != 8 else {})
    assert told == ["evaluation after step 4 ...", "evaluation after step 8 ...", "", ""]
    progress.close()
    assert stream.getvalue().splitlines()[-3:] == [
        "evaluation after step 4 ... 8.0 s, held-out loss 2.7500",
        "evaluation after step 8 ... 0.5 s",
        "eval_step=16 eval_loss=2.7500",
    ]


def test_the_panel_says_that_it_evaluates() -> None:
    drawn = board(steps=12)
    assert "evaluating" not in " ".join(draw(drawn, 120))
    drawn.evaluating = True
    assert "evaluating ..." in " ".join(draw(drawn, 120))


def test_the_stream_decides_who_speaks() -> None:
    assert isinstance(open_progress(io.StringIO(), True), PlainProgress)
    assert isinstance(open_progress(io.StringIO(), False), QuietProgress)


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = open_progress(io.StringIO(), False)
    whole_run(progress, Watch())
    progress.warn("a", "b")
    progress.say("c")
    progress.close()
    assert capsys.readouterr() == ("", "")


def board(*, steps: int, unicode: bool = True) -> Board:
    watch = Watch()
    drawn = Board(SUMMARY, now=watch, unicode=unicode)
    for step in range(1, steps + 1):
        watch.seconds += 14
        drawn.update(step, {**METRICS, "train/loss": 3.3 - 0.08 * step + 0.05 * math.sin(step)})
    if steps:
        drawn.evaluation, drawn.checkpoint = (8, {"eval/loss": 2.75}), "checkpoint-10"
    return drawn


def draw(drawn: Board, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(drawn.draw())
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("steps", [0, 1, 12, 36])
def test_the_panel_fills_its_width_and_loses_no_word(width: int, steps: int) -> None:
    lines = draw(board(steps=steps), width)
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
    assert len(draw(board(steps=12), 80)) <= 14


def test_a_terminal_without_unicode_gets_a_panel_in_ascii() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80)
    console.print(board(steps=12, unicode=False).draw())


def terminal_output(steps: int) -> str:
    ours, theirs = pty.openpty()
    watch = Watch()
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        progress = open_progress(stream, True, phases=2)
        assert isinstance(progress, PanelProgress)
        try:
            whole_run(progress, watch, steps=steps)
            progress.close()
        finally:
            stream.flush()
            os.set_blocking(ours, False)
            text = b""
            while True:
                try:
                    text += os.read(ours, 65536)
                except OSError:
                    break
    os.close(ours)
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


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    text = terminal_output(1)
    assert not [code for code in ("\x1b[3", "\x1b[4", "\x1b[9") if code in text.replace("\x1b[?25", "")]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        assert isinstance(open_progress(stream, True), PlainProgress)
    os.close(ours)


@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300), width=st.integers(1, 80))
@settings(deadline=None, max_examples=60)
def test_a_sparkline_is_never_wider_than_asked(values: list[float], width: int) -> None:
    finite = [value for value in values if math.isfinite(value)]
    assert len(sparkline(values, width=width)) == min(width, len(finite))


def test_a_falling_series_falls() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], width=8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0], width=8, unicode=False) == "=="


def test_a_reader_that_has_gone_does_not_stop_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        progress = PlainProgress(stream)
        progress.say("nobody hears this")
        with progress.phase("data"):
            progress.say("nor this")
        stream.write("and closing the stream does not fail either")


def test_a_full_disk_behind_stderr_does_not_end_the_run() -> None:
    watch = Watch()
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as stream:
        whole_run(PlainProgress(stream, now=watch), watch)
        with suppress(OSError):
            stream.close()
