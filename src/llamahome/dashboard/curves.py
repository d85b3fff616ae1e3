"""The metrics of a run in memory, one column for each metric, extended by what the file has gained since the last look.

A column takes 16 bytes a value. A record without a metric adds nothing to its column; a null, which stands for a number that was not
finite, adds nan. Curves are thinned to what a screen can show; the lowest and the highest value of each stretch stay.
"""

import math
import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from llamahome.dashboard.first_losses import read_losses
from llamahome.monitoring.readings import moment, number, whole
from llamahome.monitoring.series import Cursor, read_from, thin

Axis = Literal["step", "tokens", "time"]
AXES: tuple[Axis, ...] = ("step", "tokens", "time")

_LARGE = 16 << 20
"""Bytes of a metrics.jsonl from which on the losses are shown before everything has been read."""
_DIGITS = 7
"""Significant digits that the browser gets: more than a pixel shows."""


@dataclass
class _Column:
    """One metric: the number of the record of each value, and the value."""

    records: "array[int]" = field(default_factory=lambda: array("l"))
    values: "array[float]" = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class Line:
    """One thinned curve. `smooth` is its moving average at the same places, or None."""

    x: list[float]
    y: list[float | None]
    smooth: list[float | None] | None = None


class Curves:
    """The records of one .jsonl file as columns. Threads may share it."""

    def __init__(self, path: Path, *, large: int = _LARGE) -> None:
        """`large` is from how many bytes on the losses are shown before the rest is read."""
        self._path, self._large = path, large
        self._lock = threading.Lock()
        self._forget()
        self.generation = 0
        """Grows when the file has been replaced or shortened, as a resume does: what was read before no longer counts."""

    def _forget(self) -> None:
        self.cursor = Cursor()
        self._whole = False
        """Whether the file has been read to its end."""
        self.damaged = 0
        self._steps, self._tokens, self._times = array("d"), array("d"), array("d")
        self._columns: dict[str, _Column] = {}

    def update(self) -> None:
        """Read what was appended since the last call."""
        with self._lock:
            while True:
                found = read_from(self._path, self.cursor)
                if found.restarted:
                    self._forget()
                    self.generation += 1
                self.cursor, self.damaged = found.cursor, self.damaged + found.damaged
                self._extend(found.records)
                if not found.more:
                    self._whole = True
                    return

    def _extend(self, records: list[dict[str, Any]]) -> None:
        """Add records, one metric after the other for all records with the same keys: a loop over all values takes ten times as long."""
        first = len(self._steps)
        for column, name, read in ((self._steps, "step", whole), (self._tokens, "train/tokens", number), (self._times, "t", moment)):
            last = column[-1] if column else 0.0
            for record in records:
                value = read(record.get(name))
                last = last if value is None else max(last, value)  # a clock that was set back: no curve goes back either
                column.append(last)
        alike: dict[tuple[str, ...], list[int]] = {}
        for at, record in enumerate(records):
            alike.setdefault(tuple(record), []).append(at)
        found: dict[str, list[tuple[list[int], list[float]]]] = {}
        for names, numbers in alike.items():
            some = [records[at] for at in numbers]
            for name in names:
                if name not in ("t", "step"):
                    found.setdefault(name, []).append(_numbers(numbers, list(map(itemgetter(name), some))))
        for name, parts in found.items():
            numbers, values = parts[0] if len(parts) == 1 else _merged(parts)
            if values:
                column_of = self._columns.setdefault(name, _Column())
                column_of.records.extend([first + at for at in numbers])
                column_of.values.extend(values)

    @property
    def began(self) -> float | None:
        """Unix seconds of the first record."""
        return self._times[0] if self._times else None

    @property
    def seconds(self) -> float:
        """From the first record to the last."""
        return self._times[-1] - self._times[0] if self._times else 0.0

    @property
    def last_step(self) -> float:
        """Of the last record."""
        return self._steps[-1] if self._steps else 0.0

    @property
    def names(self) -> list[str]:
        """The metrics that have a value, in the order in which they came."""
        return list(self._columns)

    def count(self, name: str) -> int:
        """How many values a metric has."""
        return len(self._columns[name].values) if name in self._columns else 0

    def last(self, name: str) -> float | None:
        """The newest finite value of a metric."""
        column = self._columns.get(name)
        newest = next((value for value in reversed(column.values) if math.isfinite(value)), None) if column else None
        return newest

    def best(self, name: str, *, lowest: bool) -> tuple[float, float] | None:
        """(step, value) of the lowest or highest finite value of a metric, the earlier of equal ones."""
        with self._lock:
            column = self._columns.get(name, _Column())
            known = [
                (self._steps[record], value) for record, value in zip(column.records, column.values, strict=True) if math.isfinite(value)
            ]
        return min(known, key=lambda point: point[1] if lowest else -point[1], default=None)

    def seconds_per_step(self, newest: int = 50) -> float | None:
        """Wall time of a step over the newest records of train/loss; None before there are two."""
        records = self._columns.get("train/loss", _Column()).records[-newest:]
        if len(records) < 2:
            return None
        steps = self._steps[records[-1]] - self._steps[records[0]]
        return (self._times[records[-1]] - self._times[records[0]]) / steps if steps > 0 else None

    def lines(self, names: Sequence[str], axis: Axis, *, points: int, smoothing: float = 0.0, together: bool = False) -> dict[str, Line]:
        """The curves of these metrics by name. `together`: all are thinned at the same records, so that they can be stacked."""
        with self._lock:
            columns = {name: self._columns[name] for name in names if name in self._columns}
            chosen = self._chosen_together(columns, points) if together else None
            return {name: self._line(column, axis, points, smoothing, chosen) for name, column in columns.items()}

    def _chosen_together(self, columns: dict[str, _Column], points: int) -> set[int]:
        """Numbers of the records where the sum of the columns is thinned."""
        sums: dict[int, float] = {}
        for column in columns.values():
            for record, value in zip(column.records, column.values, strict=True):
                sums[record] = sums.get(record, 0.0) + value
        records = sorted(sums)
        kept, _ = thin(records, [sums[record] for record in records], points)
        return {int(record) for record in kept}

    def _line(self, column: _Column, axis: Axis, points: int, smoothing: float, chosen: set[int] | None) -> Line:
        if chosen is None:
            kept = [int(at) for at in thin(range(len(column.values)), column.values, points)[0]]
        else:
            kept = [at for at, record in enumerate(column.records) if record in chosen]
        averages = moving_average(column.values, smoothing) if smoothing > 0 else None
        return Line(
            self._places([column.records[at] for at in kept], axis),
            [_shown(column.values[at]) for at in kept],
            None if averages is None else [_shown(averages[at]) for at in kept],
        )

    def _places(self, records: list[int], axis: Axis) -> list[float]:
        if axis == "time":
            return [round(self._times[record] - self._times[0], 2) for record in records]
        column = self._steps if axis == "step" else self._tokens
        return [column[record] for record in records]

    def place_of_step(self, step: float, axis: Axis) -> float:
        """Where a step lies on an axis: at the first record of that step or later."""
        with self._lock:
            record = min(bisect_left(self._steps, step), len(self._steps) - 1)
            return self._places([record], axis)[0] if self._steps else 0.0

    def lines_of_times(self, machine: "Curves", names: Sequence[str], axis: Axis, *, points: int) -> dict[str, Line]:
        """The curves of samples of the machine, which know only their time, along an axis of this run.

        Along steps and tokens a sample lies between the two records around it; samples before the first and after the last are left out.
        """
        lines, began = machine.lines(names, "time", points=points), machine.began or 0.0
        with self._lock:
            if axis == "time":
                shift = began - self._times[0] if self._times else 0.0
                return {name: Line([round(x + shift, 2) for x in line.x], line.y) for name, line in lines.items()}
            found = {}
            for name, line in lines.items():
                places = [self._between(began + x, axis) for x in line.x]
                kept = [(place, y) for place, y in zip(places, line.y, strict=True) if place is not None]
                found[name] = Line([place for place, _ in kept], [y for _, y in kept])
            return found

    def _between(self, time: float, axis: Axis) -> float | None:
        after = bisect_left(self._times, time)
        if after == 0 or after == len(self._times):
            return None
        column = self._steps if axis == "step" else self._tokens
        share = (time - self._times[after - 1]) / (self._times[after] - self._times[after - 1])
        return round(column[after - 1] + share * (column[after] - column[after - 1]), 3)

    def first_losses(self, points: int) -> Line | None:
        """The losses of a long file that has not been read yet, in a fraction of the time that all metrics take; None if it is read."""
        try:
            if self._whole or self._path.stat().st_size < self._large:
                return None
        except OSError:
            return None
        found = read_losses(self._path, points)
        return None if found is None else Line(found[0], [None if value is None else _shown(value) for value in found[1]])


def _numbers(numbers: list[int], values: list[Any]) -> tuple[list[int], list[float]]:
    """The values that are numbers, and null as nan, each with the number of its record."""
    if set(map(type, values)) <= {float}:
        return numbers, values
    kept = [at for at, value in enumerate(values) if value is None or type(value) in (int, float)]
    found = [number(values[at]) for at in kept]
    return [numbers[at] for at in kept], [math.nan if value is None else value for value in found]


def _merged(parts: list[tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    pairs = sorted(pair for numbers, values in parts for pair in zip(numbers, values, strict=True))
    return [number for number, _ in pairs], [value for _, value in pairs]


def moving_average(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, 0 <= weight < 1, corrected for its start at zero (as in Adam, arXiv 1412.6980); nan is passed over."""
    average, share, averages = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            share = weight * share + (1 - weight)
        averages.append(average / share if share else math.nan)
    return averages


def _shown(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
