"""How often the rows of each source are seen: position in the data to row of the source, exact over every epoch.

A part is drawn `draws` times an epoch: whole copies of its rows first, then a subset. The subset changes from epoch to epoch: as many of
them as fit are cut from one permutation, so that 0.5 shows every row once in two epochs. All draws of an epoch are shuffled together. Pure
arithmetic on top of order.py: O(1) for any position, and a plain source keeps the order that it always had. Memory: 8 bytes a row held out.
"""

import bisect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.locate import locate
from llamahome.data.files.sources import Source
from llamahome.data.files.splits import EVERYTHING
from llamahome.data.steps.order import mixed_seed, rows_at
from llamahome.errors import ConfigError, DataError, Problem
from llamahome.units import many, parse_rows


@dataclass(frozen=True)
class Part:
    """Rows that are seen equally often."""

    name: str
    """What chose them, as it stands in data.mixture."""
    runs: tuple[tuple[int, int], ...]
    """Stretches of rows to train on (first, count), numbered without the held-out ones."""
    draws: int
    """How many rows of it an epoch holds."""

    @property
    def num_rows(self) -> int:
        """Rows to draw from."""
        return sum(count for _, count in self.runs)


@dataclass(frozen=True)
class RowOrder:
    """Which row of the source comes at a position, for every seed."""

    held: NDArray[np.int64]
    """Rows that are not trained on, ascending."""
    parts: tuple[Part, ...]

    @cached_property
    def epoch_rows(self) -> int:
        """Positions in an epoch."""
        return sum(part.draws for part in self.parts)

    def rows_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """The rows at these positions, counted from the start of training."""
        slots = rows_at(positions, num_rows=self.epoch_rows, seed=seed)
        epochs = positions // self.epoch_rows
        numbers = np.empty(len(positions), np.int64)
        begin = 0
        for index, part in enumerate(self.parts):
            chosen = np.flatnonzero((slots >= begin) & (slots < begin + part.draws))
            numbers[chosen] = _drawn(part, slots[chosen] - begin, epochs[chosen], seed=mixed_seed(seed, index + 1))
            begin += part.draws
        return numbers + np.searchsorted(self._before_held, numbers, side="right")

    def first_rows(self, count: int) -> NDArray[np.int64]:
        """The first `count` rows of the source that are trained on, in its own order."""
        numbers = np.arange(min(count, self._trained))
        return numbers + np.searchsorted(self._before_held, numbers, side="right")

    @cached_property
    def _before_held(self) -> NDArray[np.int64]:
        """How many rows to train on stand before each one held out."""
        return self.held - np.arange(len(self.held))

    @property
    def _trained(self) -> int:
        return max(sum(run) for part in self.parts for run in part.runs or ((0, 0),))

    def told(self) -> tuple[str, ...]:
        """What the mixture makes of the parts, for people; nothing for a plain source."""
        lines = []
        for part in self.parts:
            if part.num_rows and (len(self.parts) > 1 or part.draws != part.num_rows):
                often = f"{part.draws / part.num_rows:.4g} times each"
                lines.append(f"{part.name or 'the other files'}: {many(part.num_rows, 'row')}, {part.draws:,} seen in an epoch ({often})")
        return tuple(lines)

    def row_at(self, position: int, *, seed: int) -> int:
        """rows_at for one position."""
        return int(self.rows_at(np.array([position], np.int64), seed=seed)[0])


def plain_order(num_rows: int, *, held: NDArray[np.int64] | None = None) -> RowOrder:
    """Every row that is not held out, once an epoch; `num_rows` counts all rows of the source."""
    held = np.empty(0, np.int64) if held is None else held
    trained = num_rows - len(held)
    return RowOrder(held, (Part("", ((0, trained),), trained),))


def order_of(source: Source, held: NDArray[np.int64], amounts: Mapping[str, float | str]) -> RowOrder:
    """The order of a source's rows under data.mixture. Raises ConfigError for a name that means no file of it, or a file named twice."""
    if not amounts:
        return plain_order(len(source), held=held)
    chosen = _files_by_name(source.paths, amounts)
    starts = [bisect.bisect_left(range(len(source)), file, key=source.file_of) for file in range(len(source.paths) + 1)]
    parts = []
    for name, files in chosen.items():
        runs = _trained_runs(files, starts, held)
        parts.append(Part(name, runs, _draws(amounts.get(name, 1.0), sum(count for _, count in runs))))
    order = RowOrder(held, tuple(parts))
    if not order.epoch_rows:
        hint = "--set 'data.mixture={}' sees every row once"
        raise DataError(Problem(code="data.mixture-empty", message="it leaves no row to train on", where="data.mixture", hint=hint))
    return order


def _files_by_name(paths: Sequence[str], amounts: Mapping[str, float | str]) -> dict[str, list[int]]:
    """Numbers of the files that each name of the mixture means, and under "" those that none does."""
    number_of = {os.path.realpath(path): number for number, path in enumerate(paths)}
    chosen: dict[str, list[int]] = {}
    problems = []
    owner: dict[int, str] = {}
    for name in amounts:
        try:
            files = sorted(
                {number_of[real] for path in locate(name, wanted=EVERYTHING).files if (real := os.path.realpath(path)) in number_of}
            )
        except DataError:
            files = []
        twice = next((file for file in files if file in owner), None)
        if not files:
            message, hint = f"{name} is not among the files that are read: {', '.join(paths[:3])}", "give it as a DATA_PATH too"
            problems.append(Problem(code="data.mixture-unknown", message=message, where="data.mixture", hint=hint))
        elif twice is not None:
            message = f"{paths[twice]} is meant by {owner[twice]} and by {name}"
            hint = "names that share no file"
            problems.append(Problem(code="data.mixture-twice", message=message, where="data.mixture", hint=hint))
        owner.update(dict.fromkeys(files, name))
        chosen[name] = files
    if problems:
        raise ConfigError(problems)
    rest = [number for number in range(len(paths)) if number not in owner]
    return {**chosen, "": rest} if rest else chosen


def _draws(amount: float | str, num_rows: int) -> int:
    """How many rows an epoch holds: "1000 rows", or each row so many times; at least one unless the amount is 0."""
    if not num_rows:
        return 0
    return parse_rows(amount) if isinstance(amount, str) else max(1, round(amount * num_rows)) if amount else 0


def _trained_runs(files: Sequence[int], starts: Sequence[int], held: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """The rows of these files as runs without the held-out rows; `starts` has the first row of each file, and the end of all."""
    runs: list[tuple[int, int]] = []
    for file in files:
        begin, end = (at - int(np.searchsorted(held, at)) for at in (starts[file], starts[file + 1]))
        if runs and sum(runs[-1]) == begin:
            begin = runs.pop()[0]
        if end > begin:
            runs.append((begin, end - begin))
    return tuple(runs)


def _drawn(part: Part, slots: NDArray[np.int64], epochs: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Numbers of the rows, held-out ones not counted, at these places among the draws of the part."""
    num_rows = part.num_rows
    if not len(slots):
        return slots
    copies, rest = divmod(part.draws, num_rows)
    found = slots % num_rows
    partial = np.flatnonzero(slots >= copies * num_rows)
    if len(partial):
        subsets = num_rows // rest  # that many epochs share a permutation, each with a stretch of its own
        cycles, turns = np.divmod(epochs[partial], subsets)
        found[partial] = rows_at(cycles * num_rows + turns * rest + found[partial], num_rows=num_rows, seed=seed)
    ends = np.cumsum([count for _, count in part.runs])
    run = np.searchsorted(ends, found, side="right")
    firsts = np.array([first for first, _ in part.runs], np.int64)
    counts = np.array([count for _, count in part.runs], np.int64)
    return firsts[run] + found - (ends - counts)[run]
