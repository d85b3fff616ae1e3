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
from llamahome.units import show_seconds

PLAIN_EVERY_SECONDS = 10.0


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

    def _line(self, text: str) -> None:
        if self._open_phase is not None:
            self._write("\n")
            self._open_phase = None
        self._write(one_line(text) + "\n")

    def _write(self, text: str) -> None:
        """Write and flush; a reader that has gone (`2>&1 | tee`, and Ctrl-C ends tee first) must not cost the checkpoint."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # from now on into nothing: what waits in the buffer would fail again when Python ends
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`[2/6] data ...` at once, ` 1.2 s` when the block ends; the whole line again when something was said in between."""
        self.close()
        label, started = self._labels.next(name), self._now()
        self._write(label)
        self._open_phase, ending = label, "failed after "
        try:
            yield
            ending = ""
        finally:
            text = f" {ending}{self._now() - started:.1f} s"
            if self._open_phase == label:
                self._open_phase = None
                self._write(text + "\n")
            else:
                self._line(label + text)

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

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Goes into the next key=value line."""
        self._waiting |= {"eval_step": str(step), **short_metrics(metrics)}

    def saved(self, step: int, path: Path) -> None:
        """Goes into the next key=value line."""
        self._waiting["saved"] = str(path).replace(" ", "\\ ")

    def finish(self, lines: Sequence[str]) -> None:
        """Show the last step when it still waits, then the result on stdout."""
        self.close()
        show_results(lines)

    def close(self) -> None:
        """Show the last step when it still waits."""
        if self._waiting:
            self._show_waiting()

    def _show_waiting(self) -> None:
        pairs = sorted(self._waiting.items(), key=lambda pair: pair[0] != "step")  # the step leads, also after an evaluation
        self._line(" ".join(f"{name}={value}" for name, value in pairs))
        self._waiting = {}
        self._shown_at = self._now()
