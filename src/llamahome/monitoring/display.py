"""Text that the panel and the plain lines share: run summary, phase labels, time left, short metrics, sparkline."""

import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from llamahome import durable
from llamahome.monitoring.readings import number, whole
from llamahome.units import many, show_bytes

_SHORT_NAMES = {
    "train/loss": "loss",
    "train/reward": "reward",
    "train/pair_accuracy": "pair_accuracy",
    "train/answer_accuracy": "answer_accuracy",
    "eval/loss": "eval_loss",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "learning_rate",
    "speed/tokens_per_s": "tokens_per_s",
    "memory/rss": "rss",
    "memory/peak": "peak",
}
_UPDATES_KEPT = 50
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*#@"


def metric_name(metric: str) -> str:
    """The name of evaluation.metric in metrics and messages: of FILE.py:FUNCTION the function, marked if a figure has that name."""
    name = re.sub(r"\.py$", "", metric.rpartition(":")[2].rpartition("/")[2]) if ".py" in metric else metric
    return f"{name}_of_answers" if ".py" in metric and name in ("loss", "perplexity", "token_accuracy") else name


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What is known about a run before its first step."""

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
    """Mean tokens per example."""
    target_share: float
    """Targets divided by tokens, 0 to 1; 0 where the model learns from answers of its own."""
    batch_size: int
    tokens_per_step: float
    """Mean tokens of a global batch."""
    micro_batch_tokens: int
    processes: int
    horizon: int
    """Planned number of steps."""
    epochs: float
    folder: str
    """Where checkpoints and the final model are saved."""
    first_step: int = 0
    """The step that a resumed run continues from."""
    ends_at: float | None = None
    """When training.max_time is over, in seconds since 1970; None without a limit."""
    planned_memory: dict[str, int] | None = None
    """Bytes that the main process is planned to take, by purpose, `beside` being Python and its libraries; None if it is not known."""


SUMMARY = "summary.json"


def write_summary(metrics_dir: Path, summary: RunSummary) -> None:
    """Write summary.json beside metrics.jsonl, for those who look at the run later or from elsewhere. Raises OSError."""
    metrics_dir.mkdir(parents=True, exist_ok=True)
    durable.write_whole(metrics_dir / SUMMARY, json.dumps(asdict(summary)) + "\n", flush=False)


def read_summary(metrics_dir: Path) -> RunSummary | None:
    """What `write_summary` wrote; None for a run of an older version or one that has not begun to train, and if it cannot be used."""
    try:
        found = RunSummary(**durable.read_object(metrics_dir / SUMMARY))
    except TypeError:
        return None
    return found if found.horizon and all(_fits(field.type, getattr(found, field.name)) for field in fields(found)) else None


def _fits(kind: object, value: object) -> bool:
    """Whether the value of a field of this type can be computed with and shown."""
    if kind in (int, float):
        return (whole(value) if kind is int else number(value)) is not None
    if kind is str:
        return isinstance(value, str)
    if kind == float | None:
        return value is None or number(value) is not None
    return value is None or (isinstance(value, dict) and all(whole(size) is not None for size in value.values()))


def summary_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """Model, data and batch as (name, text); only the model where nothing is known of the data (a run of an older version)."""
    s = summary
    if not s.train_rows:
        return [("model", f"{s.model}, {s.method}")]
    trained = "every weight trained" if s.trained_share >= 1 else f"{s.trained_share:.2%} of the weights trained"
    held_out = f", {s.eval_rows:,} held out" if s.eval_rows else ", none held out"
    learned = f"{s.target_share:.0%}" if s.target_share else "answers of the model"
    processes = "1 process" if s.processes == 1 else f"{s.processes} processes"
    return [
        ("model", f"{s.model}, {s.method}, {trained}"),
        ("data", f"{many(s.train_rows, 'row')}{held_out}, {s.mean_tokens:,.0f} tokens a row, {learned} learned"),
        ("batch", f"{many(s.batch_size, 'row')}, {s.tokens_per_step:,.0f} tokens, {s.micro_batch_tokens:,} at a time, {processes}"),
    ]


class PhaseLabels:
    """Numbers the phases: `[2/6] data ...`."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._count = 0

    def next(self, name: str) -> str:
        """Return the label of the phase that begins now."""
        self._count += 1
        return f"[{self._count}/{self._total}] {name} ..." if self._total else f"{name} ..."


class StepTimer:
    """Elapsed time, and the time left, extrapolated from the last 50 updates because the first steps compile and are slow."""

    def __init__(self, summary: RunSummary, now: Callable[[], float]) -> None:
        self._now = now
        self._horizon, self._ends_at = summary.horizon, summary.ends_at
        self._started = now()
        self._updates: list[tuple[int, float]] = [(summary.first_step, self._started)]

    def update(self, step: int) -> None:
        """Note that `step` is done."""
        self._updates = [*self._updates[-_UPDATES_KEPT:], (step, self._now())]

    def elapsed(self) -> float:
        """Seconds since training began."""
        return self._now() - self._started

    def left(self) -> float | None:
        """Seconds until the horizon, or until training.max_time is over; None before the first update."""
        updates = self._updates[1:] if len(self._updates) > 3 else self._updates
        (first, began), (last, ended) = updates[0], updates[-1]
        if last <= first:
            return None
        left = (ended - began) / (last - first) * (self._horizon - last) - (self._now() - ended)
        return max(0.0, left if self._ends_at is None else min(left, self._ends_at - time.time()))


_SHOWN_AT_THE_END = ("eval/perplexity", "eval/token_accuracy", "eval/pair_accuracy", "eval/answer_accuracy")


def format_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Format the metrics that fit on a line, by short name."""
    formatted = {}
    for name, value in metrics.items():
        if name not in _SHORT_NAMES and (not name.startswith("eval/") or name in _SHOWN_AT_THE_END):
            continue
        if name.startswith("memory/"):
            text = show_bytes(value).replace(" ", "")
        elif name == "train/learning_rate":
            text = f"{value:.2e}"
        elif name.startswith("speed/"):
            text = f"{value:.0f}"
        else:
            text = f"{value:.4f}"
        formatted[_SHORT_NAMES.get(name, name.replace("/", "_"))] = text
    return formatted


def printable(text: str) -> str:
    """Remove carriage returns and terminal control codes from `text`."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def print_results(lines: Sequence[str]) -> None:
    """Print the result of a run on stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def sparkline(values: Sequence[float], *, width: int, unicode: bool = True) -> str:
    """Draw `values` as at most `width` bars, each the mean of an equal share of the values. Values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    scale = max(map(abs, finite)) or 1.0
    finite = [value / scale for value in finite]  # the sums must not overflow if the loss has diverged
    columns = min(width, len(finite))
    edges = [round(column * len(finite) / columns) for column in range(columns + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]
    return bars(means, min(means), max(means), unicode=unicode)


def bars(heights: Sequence[float | None], low: float, high: float, *, unicode: bool = True) -> str:
    """A bar for each height on a scale from `low` to `high`, and a blank for None."""
    signs = _BARS if unicode else _ASCII_BARS
    if high == low:
        return "".join(" " if height is None else signs[3] for height in heights)
    return "".join(" " if height is None else signs[max(0, min(7, int(8 * ((height - low) / (high - low)))))] for height in heights)
