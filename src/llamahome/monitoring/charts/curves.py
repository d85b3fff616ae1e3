"""The charts of a run, from the records of metrics.jsonl: loss, held-out scores, learning rate, gradient norm, speed, memory. No torch.

A chart holds every point; svg.py and png.py decide how many of them are drawn. A metric without a finite value gives no curve, and a chart
without a curve is left out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from llamahome.units import show_bytes, show_count

Point = tuple[float, float]
"""(step, value)."""

_LOG_FROM = 4.0
"""Largest value divided by the median. Above it a linear axis would press all but a few points onto the bottom line."""
_NOISY = ("Loss", "Reward", "Judged rightly", "Reward margin", "Gradient norm", "Speed")
_UPDATE = ("train/grad_norm", "train/learning_rate", "speed/tokens_per_s", "memory/")
_SHOWN = ("train/loss", "train/reward", "train/pair_accuracy", "train/answer_accuracy", "eval/", *_UPDATE)
_UNITS = {"train/pair_accuracy": "mean of pairs", "train/answer_accuracy": "mean of labelled answers", "train/reward": "mean of a step"}
"""Of a loss that is not one of targets, by a metric that only such runs have."""
_MEDIANS, _LEAST_POINTS = 400, 80
"""Points of a running median, and of the curve that has one."""


@dataclass(frozen=True)
class Curve:
    """One metric over the steps."""

    name: str
    """In the legend."""
    steps: list[float]
    values: list[float | None]
    """None where the number was not finite."""
    dots: bool = False
    """Few points, each drawn as a dot."""

    @cached_property
    def known(self) -> list[Point]:
        """The points with a finite value."""
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if value is not None]


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps with one unit."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    best: Point | None = None
    """The evaluation that is marked as the best."""
    log: bool = False
    """Whether the largest value is so far above the others that the axis is logarithmic."""

    def show(self, value: float) -> str:
        """`value` with its unit, short."""
        if self.unit == "bytes":
            return show_bytes(value)
        return short(value)


def short(value: float) -> str:
    """At most five characters for most values: 1,234, 0.123, 2e-05."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M" if size < 1e9 else f"{value:.1e}"
    if size >= 1000:
        return show_count(round(value))
    return f"{value:.4g}" if size >= 0.001 else f"{value:.2e}".replace("e-0", "e-").replace(".00e", "e")


def charts_of(records: Sequence[Mapping[str, float]], *, best: Point | None = None) -> list[Chart]:
    """The charts that these records have points for, in reading order; `best` is a (step, value) of eval/loss."""
    finite = _by_metric(records)

    def curve(name: str, label: str, *, dots: bool = False) -> Curve | None:
        steps, values = finite.get(name, ([], []))
        return Curve(label, steps, values, dots) if any(value is not None for value in values) else None

    unit = next((unit for name, unit in _UNITS.items() if name in finite), "nats per target")
    loss = _chart("Loss", unit, curve("train/loss", "training"), curve("eval/loss", "held out", dots=True), best=best)
    scores = [name for name in finite if name.startswith("eval/") and name not in ("eval/loss", "eval/perplexity")]
    scored = [curve(name, name.removeprefix("eval/").replace("_", " "), dots=True) for name in scores]
    memory = [
        curve("memory/rss", "process"),
        curve("memory/gpu_allocated", "GPU, tensors"),
        curve("memory/gpu_reserved", "GPU, reserved"),
    ]
    charts = [
        loss,
        _chart("Reward", "mean of a step", curve("train/reward", "reward")),
        _chart("Judged rightly", "share, 1 is all", curve("train/pair_accuracy", "pairs"), curve("train/answer_accuracy", "answers")),
        _chart("Reward margin", "mean of a step", curve("train/reward_margin", "margin")),
        _chart("Held-out answers", "share, 1 is all", *scored),
        _chart("Learning rate", "per step", curve("train/learning_rate", "learning rate")),
        _chart("Gradient norm", "before clipping", curve("train/grad_norm", "gradient norm")),
        _chart("Speed", "tokens per second", curve("speed/tokens_per_s", "speed")),
        _chart("Memory", "bytes", *memory),
    ]
    return [chart for chart in charts if chart is not None]


def _by_metric(records: Sequence[Mapping[str, float]]) -> dict[str, tuple[list[float], list[float | None]]]:
    found: dict[str, tuple[list[float], list[float | None]]] = {}
    for record in records:
        step = record["step"]
        for name, value in record.items():
            if not name.startswith(_SHOWN):
                continue
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(value if math.isfinite(value) else None)
    return found


def _chart(title: str, unit: str, *curves: Curve | None, best: Point | None = None) -> Chart | None:
    drawn = tuple(curve for curve in curves if curve is not None)
    values = sorted(value for curve in drawn for _, value in curve.known)
    if not values:
        return None
    log = title in ("Loss", "Gradient norm") and values[0] > 0 and values[-1] > _LOG_FROM * values[len(values) // 2]
    return Chart(title, unit, drawn, best, log)


def smoothed(chart: Chart, curve: Curve) -> Curve | None:
    """The running median over a fortieth of the steps, which a spike does not move; None where a curve is short or not noisy."""
    points = curve.known
    if chart.title not in _NOISY or curve.dots or len(points) < _LEAST_POINTS:
        return None
    half = max(2, len(points) // 80)
    centres = sorted({round(number * (len(points) - 1) / (_MEDIANS - 1)) for number in range(_MEDIANS)})
    medians: list[float | None] = [
        statistics.median(value for _, value in points[max(0, centre - half) : centre + half + 1]) for centre in centres
    ]
    return Curve("running median", [points[centre][0] for centre in centres], medians)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    rough = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [number * size for number in range(first, math.floor(high / size + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis, at most about six: powers of ten, or 1, 2 and 5 times powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) > 2:
            break
    return found[:: max(1, math.ceil(len(found) / 6))] or [low, high]
