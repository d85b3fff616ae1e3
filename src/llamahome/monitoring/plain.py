"""The progress of a run as lines for logs and pipes: no carriage returns, no colours, at most one key=value line every 10 s.

What happens between two key=value lines goes into the next one, and metrics.jsonl has every step.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llamahome.monitoring.display import PhaseLabels, RunSummary, StepTimer, format_metrics, print_results, printable, summary_rows
from llamahome.monitoring.progress import Progress
from llamahome.rundir import as_typed
from llamahome.units import show_seconds

_LINE_EVERY_SECONDS = 10.0
_LEAST_SHARE_OF_AGE = 1 / 360
"""Of the age of the run, between two lines: after an hour they become rarer, about 250 until its age has doubled, so a log stays short."""
_SHORT_EVALUATION_SECONDS = 1.0
"""An evaluation is not announced if the previous one took less than this."""


class PlainProgress(Progress):
    """Writes phases, messages, and a key=value line for the first step, the last step, and one step every 10 s."""

    def __init__(self, stream: TextIO, *, phases: int | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now = now
        self._labels = PhaseLabels(phases)
        self._open_label: str | None = None
        self._summary: RunSummary | None = None
        self._timer: StepTimer | None = None
        self._newest: tuple[int, Mapping[str, float], float, float] | None = None
        """Step, metrics, seconds since the start and seconds left of the last update that is not shown; texts are made only when it is."""
        self._pending: dict[str, str] = {}
        self._last_shown: float | None = None
        self._evaluation_label: str | None = None
        self._evaluation_started = 0.0
        self._evaluation_seconds: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Write `[2/6] data ...` at once and ` 1.2 s` at the end, after the label again if other lines came in between."""
        self.close()
        label, started, outcome = self._labels.next(name), self._now(), "failed after "
        self._begin(label)
        try:
            yield
            outcome = ""
        finally:
            self._end(label, f" {outcome}{self._now() - started:.1f} s")

    def say(self, line: str) -> None:
        """Write one line."""
        self._end_open_line()
        self._write(printable(line) + "\n")

    def start(self, summary: RunSummary) -> None:
        """Write model, data and batch, a line each."""
        self._summary = summary
        self._timer = StepTimer(summary, self._now)
        for name, text in summary_rows(summary):
            self.say(f"{name}: {text}")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of `step`, and write them if it is the first step, the last one, or 10 s after the previous line."""
        elapsed = left = 0.0
        is_last = False
        if self._timer is not None and self._summary is not None:
            self._timer.update(step)
            is_last = step >= self._summary.horizon
            elapsed, left = self._timer.elapsed(), self._timer.left() or 0.0
        self._newest = step, metrics, elapsed, left
        if is_last or self._last_shown is None or self._now() - self._last_shown >= self._line_every():
            self._show_pending()

    def _line_every(self) -> float:
        elapsed = self._timer.elapsed() if self._timer is not None else 0.0
        return max(_LINE_EVERY_SECONDS, elapsed * _LEAST_SHARE_OF_AGE)

    def evaluating(self, step: int) -> None:
        """Write `evaluation after step 12 ...`, unless the previous evaluation was short."""
        was_short = self._evaluation_seconds is not None and self._evaluation_seconds <= _SHORT_EVALUATION_SECONDS
        self._evaluation_label = None if was_short else f"evaluation after step {step} ..."
        if self._evaluation_label is not None:
            self._begin(self._evaluation_label)
        self._evaluation_started = self._now()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the time and the loss if the evaluation was announced, and add the metrics to the next key=value line."""
        self._evaluation_seconds = self._now() - self._evaluation_started
        if self._evaluation_label is not None:
            loss = f", held-out loss {metrics['eval/loss']:.4f}" if "eval/loss" in metrics else ""
            self._end(self._evaluation_label, f" {self._evaluation_seconds:.1f} s{loss}")
        if metrics:
            self._pending |= {"eval_step": str(step), **format_metrics(metrics)}

    def saved(self, step: int, path: Path) -> None:
        """Add the path to the next key=value line."""
        self._pending["saved"] = as_typed(path)

    def finish(self, lines: Sequence[str]) -> None:
        """Write the pending line, then the result on stdout."""
        self.close()
        print_results(lines)

    def close(self) -> None:
        """Write the pending line."""
        if self._pending or self._newest is not None:
            self._show_pending()
        self._end_open_line()

    def _show_pending(self) -> None:
        shown = {}
        if self._newest is not None:
            step, metrics, elapsed, left = self._newest
            shown = {"step": str(step), **format_metrics(metrics)}
            if self._summary is not None:
                shown |= {"step": f"{step}/{self._summary.horizon}", "elapsed": show_seconds(elapsed), "left": show_seconds(left)}
        self.say(" ".join(f"{name}={value}" for name, value in {**shown, **self._pending}.items()))
        self._newest, self._pending = None, {}
        self._last_shown = self._now()

    def _begin(self, label: str) -> None:
        self._end_open_line()
        self._write(label)
        self._open_label = label

    def _end(self, label: str, text: str) -> None:
        if self._open_label == label:
            self._open_label = None
            self._write(text + "\n")
        else:
            self.say(label + text)

    def _end_open_line(self) -> None:
        if self._open_label is not None:
            self._open_label = None
            self._write("\n")

    def _write(self, text: str) -> None:
        """Write and flush. A closed pipe (`2>&1 | tee`: Ctrl-C ends tee first) or a full disk must not end the training."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # redirect to the null device, because flushing the buffer at exit would fail again
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except OSError:  # stderr goes to a file on a full disk; metrics.jsonl and events.jsonl hold what is lost here
            return
