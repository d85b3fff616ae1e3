"""What became of rows, in numbers that add up over shards, processes and steps; and when the numbers stop a run."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.store.table import OUTCOMES, ExampleTable
from llamahome.data.store.truncation import Truncation
from llamahome.data.text.targets import Encoded
from llamahome.errors import DataError, Problem
from llamahome.units import many

SHOWN = 20
"""Bad rows that are listed."""


@dataclass
class Counts:
    """Counts over some rows. `tokens` and `targets` are those of the examples; data.max_length removed the `cut` ones."""

    rows: int = 0
    whole: int = 0
    truncated: int = 0
    """Rows that were cut, including those that lost all their targets."""
    split: int = 0
    dropped: int = 0
    without_targets: int = 0
    bad: int = 0
    overlong: int = 0
    """Rows refused because on_overlong is error; data.on_bad_row does not excuse them."""
    kept: int = 0
    """Rows that give examples."""
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    cut_tokens: int = 0
    cut_targets: int = 0
    system_merged: int = 0
    """Rows whose system text was written before the first question."""
    losses: Truncation = field(default_factory=Truncation)
    """What data.max_length removed."""
    longest_needed: int = 0
    """The max_length that keeps all of the longest row that lost all its targets."""
    problems: list[Problem] = field(default_factory=list)
    """The first bad rows."""

    def count_table(self, table: ExampleTable) -> None:
        """Add everything that a table says about its rows."""
        self.rows += table.num_rows
        for name, count in zip(OUTCOMES, np.bincount(table.outcomes, minlength=len(OUTCOMES)).tolist(), strict=True):
            setattr(self, name, getattr(self, name) + count)
        emptied = (table.outcomes == OUTCOMES.index("without_targets")) & (table.cut_tokens > 0)
        self.truncated += int(np.count_nonzero(emptied))
        self.kept += int(np.count_nonzero(np.diff(table.firsts)))
        self.examples += len(table)
        self.tokens += len(table.tokens)
        self.targets += int(np.count_nonzero(table.targets))
        self.cut_tokens += int(table.cut_tokens.sum(dtype=np.int64))
        self.cut_targets += int(table.cut_targets.sum(dtype=np.int64))

    def add_problem(self, problem: Problem) -> None:
        """Record why a row is bad; the row itself is counted with its table."""
        self.overlong += problem.code == "data.overlong"
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def add_length(self, encoded: Encoded, where: str, *, kept: bool) -> None:
        """Record the length of a row before it was cut; `kept` is whether it gives an example."""
        self.losses.add(encoded, where)
        if not kept:
            self.longest_needed = max(self.longest_needed, encoded.needed)

    def add(self, other: "Counts") -> None:
        """Add the counts of the rows that come after these."""
        self.losses.merge(other.losses)
        self.longest_needed = max(self.longest_needed, other.longest_needed)
        self.problems = [*self.problems, *other.problems][:SHOWN]
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def sums(self) -> dict[str, int]:
        """The sums alone, for an event."""
        return {name: getattr(self, name) for name in _SUMS}

    def as_json(self) -> dict[str, Any]:
        """All counts as JSON values; `counts_from` reads them."""
        return asdict(self) | {"losses": self.losses.as_json()}


_SUMS = [item.name for item in fields(Counts) if item.type is int and item.name != "longest_needed"]


def counts_from(values: dict[str, Any]) -> Counts:
    """The counts that `as_json` gave; raises TypeError or KeyError if `values` is anything else."""
    problems, losses = [Problem(**problem) for problem in values["problems"]], Truncation.from_json(values["losses"])
    return Counts(**{**values, "problems": problems, "losses": losses})


def refuse_bad_rows(data: DataConfig, path: str, counts: Counts) -> None:
    """Raise DataError if more rows are bad than the settings allow; `counts` covers all rows of `path`."""
    rows = counts.rows
    if counts.overlong and data.on_overlong == "error":
        hint = "--set data.on_overlong=truncate cuts their end off, drop leaves them out"
    elif not counts.bad or (data.on_bad_row == "skip" and counts.bad <= allowed_bad(data, rows)):
        return
    else:
        hint = _skip_hint(counts, data)
    more = f", the first {SHOWN} are listed" if counts.bad > SHOWN else ""
    allowed = f"; data.max_bad_share allows {data.max_bad_share:g}" if data.on_bad_row == "skip" else ""
    message = f"{counts.bad:,} of {many(rows, 'row')} cannot be used{more}{allowed}"
    raise DataError([*counts.problems[:SHOWN], Problem(code="data.bad-rows", message=message, where=path, hint=hint)])


def allowed_bad(data: DataConfig, rows: int) -> float:
    """How many of `rows` may be bad if bad rows are skipped; rounded up a little, so that 0.1 of 10 is 1."""
    return data.max_bad_share * rows + 1e-9


def require_targets(data: DataConfig, path: str, counts: Counts) -> None:
    """Raise DataError if no row gives an example."""
    if counts.kept:
        return
    if counts.truncated + counts.dropped:
        message = f"nothing is left to learn: data.max_length {data.max_length:,} cuts every answer off"
        hint = f"--set data.max_length={counts.longest_needed} keeps all of the longest row"
    else:
        message, hint = "nothing is left to learn: no row has more than one token", "give longer texts"
    raise DataError(Problem(code="data.no-targets", message=message, where=path, hint=hint))


def _skip_hint(counts: Counts, data: DataConfig) -> str:
    if counts.bad == counts.rows:
        hints = {problem.hint for problem in counts.problems}
        return (hints.pop() if len(hints) == 1 else None) or "repair the rows; not one of them can be used"
    share = np.ceil(counts.bad / counts.rows * 1e4) / 1e4
    wider = f" --set data.max_bad_share={min(share, 0.9999):g}" if counts.bad > data.max_bad_share * counts.rows else ""
    return f"repair them, or leave them out with{wider if data.on_bad_row == 'skip' else f' --set data.on_bad_row=skip{wider}'}"
