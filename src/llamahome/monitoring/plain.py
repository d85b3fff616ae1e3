"""The progress of a run as lines, for logs and pipes: no carriage returns, no colours, one key=value line at most every 10 s.

Nothing is lost by the rule: what a line would have said goes into the next one, and metrics.jsonl has every step.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llamahome.monitoring.progress import Pace, PhaseLabels, RunSummary, describe, one_line, short_metrics, show_results
from llamahome.rundir import as_typed
from llamahome.units import show_seconds

PLAIN_EVERY_SECONDS = 10.0
_SHORT_EVALUATION = 1.0
"""Seconds: an evaluation that took no longer the last time is not told when it begins."""


class PlainProgress:
    """Lines for logs and pipes: no carriage returns, no colours, a key=value line for the first, the last, and one step per 10 s."""

    def __init__(self, stream: TextIO, *, phases: int | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now = now
        self._labels = PhaseLabels(phases)
        self._open_phase: str | None = None
        self._summary: RunSummary | None = None
        self._pace: Pace | None = None
        self._waiting: dict[str, str] = {}
        self._shown_at: float | None = None
        self._evaluation: str | None = None
        self._evaluation_began = 0.0
        self._evaluation_took: float | None = None

    def _line(self, text: str) -> None:
        self._end_line()
        self._write(one_line(text) + "\n")

    def _end_line(self) -> None:
        if self._open_phase is not None:
            self._write("\n")
            self._open_phase = None

    def _begin(self, label: str) -> None:
        self._end_line()
        self._write(label)
        self._open_phase = label

    def _end(self, label: str, text: str) -> None:
        if self._open_phase == label:
            self._open_phase = None
            self._write(text + "\n")
        else:
            self._line(label + text)

    def _write(self, text: str) -> None:
        """Write and flush; a reader that has gone (`2>&1 | tee`, and Ctrl-C ends tee first) or a full disk must not cost the training."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # from now on into nothing: what waits in the buffer would fail again when Python ends
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
        except OSError:  # of the file that stderr was sent to; what is lost there stands in metrics.jsonl and events.jsonl
            return

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`[2/6] data ...` at once, ` 1.2 s` when the block ends; the whole line again when something was said in between."""
        self.close()
        label, started, ending = self._labels.next(name), self._now(), "failed after "
        self._begin(label)
        try:
            yield
            ending = ""
        finally:
            self._end(label, f" {ending}{self._now() - started:.1f} s")

    def say(self, line: str) -> None:
        """Show one line."""
        self._line(line)

    def warn(self, message: str, consequence: str) -> None:
        """`warning: message; consequence`."""
        self._line(f"warning: {message}; {consequence}")

    def start(self, summary: RunSummary) -> None:
        """Show what is trained on what, in three lines."""
        self._summary = summary
        self._pace = Pace(summary, self._now)
        for name, text in describe(summary):
            self._line(f"{name}: {text}")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note a step; show it when it is the first, the last, or 10 s after the line before."""
        self._waiting |= {"step": str(step), **short_metrics(metrics)}
        last = False
        if self._pace is not None and self._summary is not None:
            self._pace.reached(step)
            last = step >= self._summary.horizon
            self._waiting |= {
                "step": f"{step}/{self._summary.horizon}",
                "elapsed": show_seconds(self._pace.elapsed()),
                "left": show_seconds(self._pace.left() or 0.0),
            }
        if last or self._shown_at is None or self._now() - self._shown_at >= PLAIN_EVERY_SECONDS:
            self._show_waiting()

    def evaluating(self, step: int) -> None:
        """`evaluation after step 12 ...`, as of a phase; not said when the last evaluation was short."""
        told = self._evaluation_took is None or self._evaluation_took > _SHORT_EVALUATION
        self._evaluation = f"evaluation after step {step} ..." if told else None
        if self._evaluation is not None:
            self._begin(self._evaluation)
        self._evaluation_began = self._now()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The time it took and its loss where it was said that it began; the figures go into the next key=value line, too."""
        self._evaluation_took = self._now() - self._evaluation_began
        if self._evaluation is not None:
            loss = f", held-out loss {metrics['eval/loss']:.4f}" if "eval/loss" in metrics else ""
            self._end(self._evaluation, f" {self._evaluation_took:.1f} s{loss}")
        if metrics:
            self._waiting |= {"eval_step": str(step), **short_metrics(metrics)}

    def saved(self, step: int, path: Path) -> None:
        """Goes into the next key=value line."""
        self._waiting["saved"] = as_typed(path)

    def finish(self, lines: Sequence[str]) -> None:
        """Show the last step when it still waits, then the result on stdout."""
        self.close()
        show_results(lines)

    def close(self) -> None:
        """Show the last step when it still waits."""
        if self._waiting:
            self._show_waiting()
        self._end_line()

    def _show_waiting(self) -> None:
        pairs = sorted(self._waiting.items(), key=lambda pair: pair[0] != "step")  # the step leads, also after an evaluation
        self._line(" ".join(f"{name}={value}" for name, value in pairs))
        self._waiting = {}
        self._shown_at = self._now()
