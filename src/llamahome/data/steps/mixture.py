"""How often the rows of each source occur: maps a position in the data to a row of the source, exactly for every epoch.

An epoch has `draws` draws from a part: complete copies of its rows first, then a subset. The subset changes from epoch to epoch:
consecutive epochs take theirs from one permutation, so that an amount of 0.5 shows every row once in two epochs. All draws of an epoch are
shuffled together. Pure arithmetic on top of order.py: O(1) for any position. Memory: 8 bytes per held-out row.
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
from llamahome.data.steps.order import Ranges, mixed_seed, positions_of, rows_at
from llamahome.errors import ConfigError, DataError, Problem
from llamahome.units import many, parse_rows


@dataclass(frozen=True)
class MixtureSource:
    """Rows that occur equally often."""

    name: str
    """The name in data.mixture that selects them."""
    runs: tuple[tuple[int, int], ...]
    """Ranges (first, count) of rows to train on, numbered without the held-out ones."""
    draws: int
    """How many of its rows an epoch holds."""

    @property
    def num_rows(self) -> int:
        """The number of rows to draw from."""
        return sum(count for _, count in self.runs)


@dataclass(frozen=True)
class RowOrder:
    """Which row of the source is at a position, for every seed."""

    held: NDArray[np.int64]
    """The held-out rows, ascending."""
    parts: tuple[MixtureSource, ...]
    passed: Ranges = ()
    """Positions that are passed over."""

    @cached_property
    def epoch_rows(self) -> int:
        """The number of positions in an epoch."""
        return sum(part.draws for part in self.parts)

    def rows_at(self, positions: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """The rows at these positions, counted from the start of training without those that are passed over."""
        positions = positions_of(positions, self.passed)
        slots = rows_at(positions, num_rows=self.epoch_rows, seed=seed)
        epochs = positions // self.epoch_rows
        numbers = np.empty(len(positions), np.int64)
        begin = 0
        for index, part in enumerate(self.parts):
            at = np.flatnonzero((slots >= begin) & (slots < begin + part.draws))
            numbers[at] = _draw(part, slots[at] - begin, epochs[at], seed=mixed_seed(seed, index + 1))
            begin += part.draws
        return numbers + np.searchsorted(self._before_held, numbers, side="right")

    def first_rows(self, count: int) -> NDArray[np.int64]:
        """The first `count` rows of the source to train on, in the order of the source."""
        numbers = np.arange(min(count, self._trained))
        return numbers + np.searchsorted(self._before_held, numbers, side="right")

    @cached_property
    def _before_held(self) -> NDArray[np.int64]:
        """The number of rows to train on before each held-out row."""
        return self.held - np.arange(len(self.held))

    @property
    def _trained(self) -> int:
        return max(sum(run) for part in self.parts for run in part.runs or ((0, 0),))

    def told(self) -> tuple[str, ...]:
        """Lines that describe how often the rows of each part occur; none without a mixture."""
        lines = []
        for part in self.parts:
            if part.num_rows and (len(self.parts) > 1 or part.draws != part.num_rows):
                often = f"{part.draws / part.num_rows:.4g} times each"
                lines.append(f"{part.name or 'the other files'}: {many(part.num_rows, 'row')}, {part.draws:,} seen in an epoch ({often})")
        return tuple(lines)


def plain_order(num_rows: int, *, held: NDArray[np.int64] | None = None) -> RowOrder:
    """Every row that is not held out, once per epoch; `num_rows` counts all rows of the source."""
    held = np.empty(0, np.int64) if held is None else held
    trained = num_rows - len(held)
    return RowOrder(held, (MixtureSource("", ((0, trained),), trained),))


def order_of(source: Source, held: NDArray[np.int64], amounts: Mapping[str, float | str]) -> RowOrder:
    """The order of a source's rows under data.mixture. Raises ConfigError if a name matches no file or two names match the same file."""
    if not amounts:
        return plain_order(len(source), held=held)
    named = _files_by_name(source.paths, amounts)
    starts = [bisect.bisect_left(range(len(source)), file, key=source.file_of) for file in range(len(source.paths) + 1)]
    parts = []
    for name, files in named.items():
        runs = _trained_runs(files, starts, held)
        parts.append(MixtureSource(name, runs, _draws(amounts.get(name, 1.0), sum(count for _, count in runs))))
    order = RowOrder(held, tuple(parts))
    if not order.epoch_rows:
        hint = "--set 'data.mixture={}' sees every row once"
        raise DataError(Problem(code="data.mixture-empty", message="it leaves no row to train on", where="data.mixture", hint=hint))
    return order


def _files_by_name(paths: Sequence[str], amounts: Mapping[str, float | str]) -> dict[str, list[int]]:
    """The indices of the files that each name of the mixture matches, and those of all other files under ""."""
    number_of = {os.path.realpath(path): number for number, path in enumerate(paths)}
    named: dict[str, list[int]] = {}
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
        named[name] = files
    if problems:
        raise ConfigError(problems)
    rest = [number for number in range(len(paths)) if number not in owner]
    return {**named, "": rest} if rest else named


def _draws(amount: float | str, num_rows: int) -> int:
    """How many rows an epoch holds: given as rows ("1000 rows") or as a factor; at least one row unless the factor is 0."""
    if not num_rows:
        return 0
    return parse_rows(amount) if isinstance(amount, str) else max(1, round(amount * num_rows)) if amount else 0


def _trained_runs(files: Sequence[int], starts: Sequence[int], held: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """The rows of these files as ranges without held-out rows; `starts` holds the first row of each file, and the number of all rows."""
    runs: list[tuple[int, int]] = []
    for file in files:
        begin, end = (at - int(np.searchsorted(held, at)) for at in (starts[file], starts[file + 1]))
        if runs and sum(runs[-1]) == begin:
            begin = runs.pop()[0]
        if end > begin:
            runs.append((begin, end - begin))
    return tuple(runs)


def _draw(part: MixtureSource, slots: NDArray[np.int64], epochs: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """The rows, numbered without held-out ones, for these slots among the draws of the part."""
    num_rows = part.num_rows
    if not len(slots):
        return slots
    copies, rest = divmod(part.draws, num_rows)
    rows = slots % num_rows
    partial = np.flatnonzero(slots >= copies * num_rows)
    if len(partial):
        subsets = num_rows // rest  # so many epochs share a permutation, each with its own part of it
        cycles, turns = np.divmod(epochs[partial], subsets)
        rows[partial] = rows_at(cycles * num_rows + turns * rest + rows[partial], num_rows=num_rows, seed=seed)
    ends = np.cumsum([count for _, count in part.runs])
    run = np.searchsorted(ends, rows, side="right")
    firsts = np.array([first for first, _ in part.runs], np.int64)
    counts = np.array([count for _, count in part.runs], np.int64)
    return firsts[run] + rows - (ends - counts)[run]
