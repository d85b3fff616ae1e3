"""What became of rows, counted: sums that can be added up over shards, processes and steps."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from llamahome.data.checks.losses import Losses
from llamahome.data.store.table import OUTCOMES, ExampleTable
from llamahome.data.text.targets import Encoded
from llamahome.errors import Problem

SHOWN = 20
"""Bad rows that are listed."""


@dataclass
class Counts:
    """Counts over some rows. Tokens and targets are those of the examples, `cut` ones are lost to max_length."""

    rows: int = 0
    whole: int = 0
    truncated: int = 0
    """Rows that were cut, with those of which nothing is left to learn."""
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
    losses: Losses = field(default_factory=Losses)
    """What max_length takes away."""
    longest_needed: int = 0
    """max_length that keeps all of the longest row left without a target."""
    problems: list[Problem] = field(default_factory=list)
    """The first bad rows."""

    def count_table(self, table: ExampleTable) -> None:
        """All that a table knows of its rows."""
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

    def note_problem(self, problem: Problem) -> None:
        """Why a row is bad; the row itself is counted with its table."""
        self.overlong += problem.code == "data.overlong"
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def note_length(self, encoded: Encoded, where: str, *, kept: bool) -> None:
        """How long a row was before it was cut, and whether anything is left of it."""
        self.losses.add(encoded, where)
        if not kept:
            self.longest_needed = max(self.longest_needed, encoded.num_tokens)

    def add(self, other: "Counts") -> None:
        """Count the rows of `other` too; they come after these."""
        self.losses.merge(other.losses)
        self.longest_needed = max(self.longest_needed, other.longest_needed)
        self.problems = [*self.problems, *other.problems][:SHOWN]
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def sums(self) -> dict[str, int]:
        """The sums alone, for an event."""
        return {name: getattr(self, name) for name in _SUMS}

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self) | {"losses": self.losses.as_json()}


_SUMS = [each.name for each in fields(Counts) if each.type is int and each.name != "longest_needed"]


def counts_from(values: dict[str, Any]) -> Counts:
    """What `as_json` gave; raises TypeError or KeyError when it is something else."""
    problems, losses = [Problem(**problem) for problem in values["problems"]], Losses.from_json(values["losses"])
    return Counts(**{**values, "problems": problems, "losses": losses})
