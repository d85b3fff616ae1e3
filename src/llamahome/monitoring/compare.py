"""Compares runs by their files: the settings that differ, the results, and curves on one scale. No torch."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.config.load import AUTO
from llamahome.config.yamltext import write_value
from llamahome.monitoring.charts.curves import Curve
from llamahome.monitoring.display import bars
from llamahome.monitoring.report import RunReport
from llamahome.monitoring.series import thin
from llamahome.units import show_count, show_seconds

_CURVE_POINTS = 500
"""Of one curve in JSON."""
_LONGEST_ORIGIN = 24


@dataclass(frozen=True)
class Differing:
    """A setting that is not the same in all runs."""

    key: str
    values: list[Any]
    """Of each run; None for a run whose settings cannot be read."""
    origins: list[str | None]
    """Where each value came from; None as above."""

    def shown(self) -> list[str]:
        """Each value as it is written in YAML, with where it came from if that is short and not a default."""
        return [
            "?" if origin is None else write_value(value) + _in_brackets(origin)
            for value, origin in zip(self.values, self.origins, strict=True)
        ]


def _in_brackets(origin: str) -> str:
    word = "auto" if origin.startswith(AUTO) else origin
    return "" if word == "default" or len(word) > _LONGEST_ORIGIN else f" ({word})"


def differing_settings(reports: Sequence[RunReport]) -> list[Differing]:
    """The settings that differ between the runs whose settings can be read, in the order of the schema."""
    readable = [report for report in reports if report.settings]
    found = []
    for key in readable[0].settings if readable else ():
        if any(report.settings[key] != readable[0].settings[key] for report in readable):
            values = [report.settings.get(key) for report in reports]
            found.append(Differing(key, values, [report.origins.get(key) if report.settings else None for report in reports]))
    return found


def figures(report: RunReport) -> dict[str, Any]:
    """The results of one run as JSON; None for what is not known."""
    last = report.evaluations[-1] if report.evaluations else {}
    return {
        "run_id": report.info.run_id,
        "state": report.info.state,
        "steps": report.info.step,
        "horizon": report.info.horizon,
        "best_evaluation": None if report.best is None else {"step": report.best.step, "value": report.best.value},
        "last_evaluation": _at(last, "eval/loss"),
        "last_pair_accuracy": _at(last, "eval/pair_accuracy"),
        "last_answer_accuracy": _at(last, "eval/answer_accuracy"),
        "last_reward": _at(next((record for record in reversed(report.records) if "train/reward" in record), {}), "train/reward"),
        "last_loss": report.losses[-1].value if report.losses else None,
        "tokens_per_s": report.tokens_per_second,
        "training_seconds": report.training_seconds or None,
        "tokens": report.tokens or None,
        "damaged_lines": report.damaged_lines,
        "settings_problem": report.settings_problem,
    }


def _at(record: Mapping[str, float], metric: str) -> dict[str, Any] | None:
    return {"step": int(record["step"]), "value": record[metric]} if metric in record else None


def figure_rows(reports: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """The results as (name, text for each run)."""

    def at(point: Any) -> str:
        return f"{point['value']:.4f} at step {point['step']:,}"

    shows: dict[str, tuple[str, Callable[[Any], str]]] = {
        "steps": ("steps", lambda steps: f"{steps:,}"),
        "best_evaluation": ("best evaluation", at),
        "last_evaluation": ("last held-out loss", at),
        "last_pair_accuracy": ("last pair accuracy", at),
        "last_answer_accuracy": ("last answer accuracy", at),
        "last_reward": ("last reward", at),
        "last_loss": ("last training loss", lambda loss: f"{loss:.4f}"),
        "tokens_per_s": ("tokens/s", show_count),
        "training_seconds": ("time in steps", show_seconds),
        "tokens": ("tokens", show_count),
    }
    columns = [figures(report) for report in reports]
    return [
        (name, ["-" if column[key] is None else show(column[key]) for column in columns])
        for key, (name, show) in shows.items()
        if any(column[key] is not None for column in columns)
    ]


def curve_of(report: RunReport, metric: str) -> Curve:
    """A metric of one run over its steps."""
    records = [record for record in report.records if metric in record]
    values = [record[metric] if math.isfinite(record[metric]) else None for record in records]
    return Curve(metric, [record["step"] for record in records], values)


def curve_lines(reports: Sequence[RunReport], metric: str, *, width: int, unicode: bool) -> list[str] | None:
    """A line of bars for each run, all on one scale of steps and values; None if no run has the metric.

    A bar is the median of its steps, so that a spike does not press all other bars flat.
    """
    curves = [curve_of(report, metric).known for report in reports]
    last = max((points[-1][0] for points in curves if points), default=None)
    if last is None:
        return None
    heights = [_columns(points, last, width) for points in curves]
    known = [height for row in heights for height in row if height is not None]
    low, high = min(known), max(known)
    lines = [bars(row, low, high, unicode=unicode).rstrip() or "-" for row in heights]
    return [f"{low:.4g} to {high:.4g} over {last:,.0f} steps", *lines]


def _columns(points: Sequence[tuple[float, float]], last: float, width: int) -> list[float | None]:
    """The median of the points of each column; a column between two points repeats the one before it."""
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        columns[min(width - 1, int(width * step / last) if last else 0)].append(value)
    final = max((number for number, values in enumerate(columns) if values), default=-1)
    heights: list[float | None] = []
    for number, values in enumerate(columns):
        before = heights[-1] if heights else None
        heights.append(statistics.median(values) if values else before if number <= final else None)
    return heights


def as_json(reports: Sequence[RunReport]) -> dict[str, Any]:
    """The object that `runs compare --json` prints."""
    curves: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for report in reports:
        own = curves.setdefault(report.info.run_id, {})
        for metric in ("train/loss", "eval/loss"):
            curve = curve_of(report, metric)
            own[metric] = list(zip(*thin(curve.steps, curve.values, _CURVE_POINTS), strict=True))
    ids = [report.info.run_id for report in reports]
    return {
        "runs": [figures(report) for report in reports],
        "settings": {
            each.key: {
                run_id: {"value": value, "origin": origin}
                for run_id, value, origin in zip(ids, each.values, each.origins, strict=True)
                if origin is not None
            }
            for each in differing_settings(reports)
        },
        "curves": curves,
    }
