"""What people see of a run: phases with a clock, then a panel on a terminal or one key=value line at most every 10 s elsewhere.

Progress goes to stderr; the lines of `finish` are results and go to stdout. Only the main rank speaks. What is common
to both is here; the panel is in panel.py, the lines in plain.py.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from llamahome.units import many, show_bytes

_SHORT_NAMES = {
    "train/loss": "loss",
    "eval/loss": "eval_loss",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "learning_rate",
    "speed/tokens_per_s": "tokens_per_s",
    "memory/rss": "rss",
    "memory/peak": "peak",
}


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What is known of a run before its first step."""

    run_id: str
    model: str
    """Name of the base as the user gave it."""
    method: str
    """lora or full."""
    trained_share: float
    """Trained weights divided by all weights, 0 to 1."""
    train_rows: int
    eval_rows: int
    mean_tokens: float
    """Tokens of an example, on average."""
    target_share: float
    """Targets divided by tokens, 0 to 1."""
    batch_size: int
    tokens_per_step: float
    """Tokens of a global batch, on average."""
    micro_batch_tokens: int
    processes: int
    horizon: int
    """Planned number of steps."""
    epochs: float
    folder: str
    """Where checkpoints and the final model go."""
    first_step: int = 0
    """The step that a resumed run continues from."""


class Progress(Protocol):
    """What a run tells people while it works."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show `name` while the block runs, and how long it took."""

    def say(self, line: str) -> None:
        """Show one line."""

    def warn(self, message: str, consequence: str) -> None:
        """Show what is wrong and what follows from it."""

    def start(self, summary: RunSummary) -> None:
        """Training begins."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`metrics` is what Recorder.write returned for `step`."""

    def evaluating(self, step: int) -> None:
        """The model of `step` is being evaluated; `evaluated` follows."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The model of `step` was evaluated; no metrics when there were no held-out rows."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint of `step` is complete."""

    def finish(self, lines: Sequence[str]) -> None:
        """Show the result on stdout; nothing comes after it."""

    def close(self) -> None:
        """Leave the terminal as it was found, whatever happened. May be called twice."""


def open_progress(stream: TextIO, is_main: bool, *, phases: int | None = None) -> Progress:
    """The panel when `stream` is a terminal, plain lines when it is not, silence on other ranks; `phases` is how many there will be."""
    if not is_main:
        return QuietProgress()
    if stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown"):
        from llamahome.monitoring.panel import PanelProgress

        return PanelProgress(stream, phases=phases)
    from llamahome.monitoring.plain import PlainProgress

    return PlainProgress(stream, phases=phases)


class QuietProgress:
    """Says nothing: the progress of every rank but the main one."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run the block."""
        yield

    def say(self, line: str) -> None:
        """Nothing."""

    def warn(self, message: str, consequence: str) -> None:
        """Nothing."""

    def start(self, summary: RunSummary) -> None:
        """Nothing."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def evaluating(self, step: int) -> None:
        """Nothing."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def saved(self, step: int, path: Path) -> None:
        """Nothing."""

    def finish(self, lines: Sequence[str]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PhaseLabels:
    """Numbers the phases: `[2/6] data ...`."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._count = 0

    def next(self, name: str) -> str:
        """The label of the phase that begins now."""
        self._count += 1
        return f"[{self._count}/{self._total}] {name} ..." if self._total else f"{name} ..."


class Pace:
    """How long a run has taken and will still take, judged by its last 50 updates: the first steps compile and are slow."""

    def __init__(self, summary: RunSummary, now: Callable[[], float]) -> None:
        self._now = now
        self._horizon = summary.horizon
        self._started = now()
        self._seen: list[tuple[int, float]] = [(summary.first_step, self._started)]

    def reached(self, step: int) -> None:
        """`step` is done."""
        self._seen = [*self._seen[-50:], (step, self._now())]

    def elapsed(self) -> float:
        """Seconds since training began."""
        return self._now() - self._started

    def left(self) -> float | None:
        """Seconds until the horizon, or None before there is anything to judge by."""
        seen = self._seen[1:] if len(self._seen) > 3 else self._seen
        (first, began), (last, ended) = seen[0], seen[-1]
        if last <= first:
            return None
        return max(0.0, (ended - began) / (last - first) * (self._horizon - last) - (self._now() - ended))


def describe(summary: RunSummary) -> list[tuple[str, str]]:
    """What is trained, on what, and the arithmetic of a batch, as (name, text)."""
    s = summary
    trained = "every weight trained" if s.trained_share >= 1 else f"{s.trained_share:.2%} of the weights trained"
    held_out = f", {s.eval_rows:,} held out" if s.eval_rows else ", none held out"
    processes = "1 process" if s.processes == 1 else f"{s.processes} processes"
    return [
        ("model", f"{s.model}, {s.method}, {trained}"),
        ("data", f"{many(s.train_rows, 'row')}{held_out}, {s.mean_tokens:,.0f} tokens a row, {s.target_share:.0%} learned"),
        ("batch", f"{many(s.batch_size, 'row')}, {s.tokens_per_step:,.0f} tokens, {s.micro_batch_tokens:,} at a time, {processes}"),
    ]


def short_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """The metrics that fit on a line, formatted, by short name."""
    shown = {}
    for name, value in metrics.items():
        if name.startswith("memory/"):
            text = show_bytes(value).replace(" ", "")
        elif name == "train/learning_rate":
            text = f"{value:.2e}"
        elif name.startswith("speed/"):
            text = f"{value:.0f}"
        else:
            text = f"{value:.4f}"
        if name in _SHORT_NAMES:
            shown[_SHORT_NAMES[name]] = text
    return shown


def one_line(text: str) -> str:
    """`text` without carriage returns and terminal control codes."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def show_results(lines: Sequence[str]) -> None:
    """The end block of a run, on stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
