"""What `data check` finds: one thing that is wrong with the data, where it is, and whether a training run would refuse it."""

import bisect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from llamahome.data.files.sources import Source
from llamahome.data.records import Row, place_of
from llamahome.errors import Problem

Level = Literal["error", "warning"]

_LINE = re.compile(r":(?:row )?(\d+)(?: \(row \d+\))?$")
SHOWN = 20
"""Findings of one kind that are shown to people; all are counted, and --json prints all."""


@dataclass(frozen=True)
class Place:
    """Where a row is."""

    source: str
    row: int
    """Zero-based number within its file, as in `data show --row`."""
    line: int

    @property
    def where(self) -> str:
        """`path:line`, as errors name it."""
        return place_of(self.source, self.line, self.row)


@dataclass(frozen=True)
class Found:
    """One finding. An error is what a training run with these settings refuses; a warning is what it does all the same."""

    level: Level
    problem: Problem
    place: Place | None = None
    """None when it is not about one row."""
    path: str | None = None
    """Where in the row, like messages[2].content."""

    def as_json(self) -> dict[str, Any]:
        """The object that `data check --json` prints."""
        place = self.place
        problem = self.problem
        if place is not None:
            known: dict[str, Any] = {"source": place.source, "line": place.line, "row": place.row}
        else:
            line = _LINE.search(problem.where or "")
            source = (problem.where or "").removesuffix(line[0]) if line else problem.where
            known = {"source": source, "line": int(line[1]) if line else None, "row": None}
        return {
            "level": self.level,
            "code": problem.code,
            "where": problem.where,
            **known,
            "path": self.path,
            "message": problem.message,
            "excerpt": problem.excerpt,
            "hint": problem.hint,
        }


@dataclass
class Tally:
    """Counts of each kind, and the first findings of it."""

    counts: Counter[tuple[Level, str]] = field(default_factory=Counter)
    first: dict[tuple[Level, str], list[Found]] = field(default_factory=dict)

    def add(self, found: Found) -> None:
        """Count one finding; keep it when it is among the first of its kind."""
        kind = (found.level, found.problem.code)
        self.counts[kind] += 1
        kept = self.first.setdefault(kind, [])
        if len(kept) < SHOWN:
            kept.append(found)

    def kinds(self) -> list[tuple[Level, str]]:
        """Every kind that was found: errors before warnings, in the order of the alphabet."""
        return sorted(self.counts)

    def total(self, level: Level) -> int:
        """How many findings of this level there are."""
        return sum(count for (one, _), count in self.counts.items() if one == level)

    def shown(self) -> Iterator[Found]:
        """The first findings of each kind."""
        for kind in self.kinds():
            yield from self.first[kind]


def row_place(source: Source, number: int, parsed: Row | Problem) -> Place:
    """Where row `number`, counted over all files of the source, is; also when it could not be parsed."""
    if isinstance(parsed, Row):
        return Place(parsed.source, parsed.index, parsed.line)
    which = source.file_of(number)
    first = bisect.bisect_left(range(len(source)), which, key=source.file_of)
    line = _LINE.search(parsed.where or "")
    return Place(source.paths[which], number - first, int(line[1]) if line else number - first + 1)
