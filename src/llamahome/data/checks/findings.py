"""The findings of `data check`: what is wrong, where, and whether a training run would refuse it."""

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
"""How many findings of one kind are shown; all of them are counted, and --json prints all."""


@dataclass(frozen=True)
class RowLocation:
    """The file, row and line of a row."""

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
    """One finding. A training run with these settings refuses an error and accepts what a warning is about."""

    level: Level
    problem: Problem
    place: RowLocation | None = None
    """None if the finding is not about a single row."""
    path: str | None = None
    """The place in the row, such as messages[2].content."""

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
    """How many findings of each kind there are, and the first of them."""

    counts: Counter[tuple[Level, str]] = field(default_factory=Counter)
    first: dict[tuple[Level, str], list[Found]] = field(default_factory=dict)

    def add(self, found: Found) -> None:
        """Count one finding; keep it if it is among the first of its kind."""
        kind = (found.level, found.problem.code)
        self.counts[kind] += 1
        kept = self.first.setdefault(kind, [])
        if len(kept) < SHOWN:
            kept.append(found)

    def kinds(self) -> list[tuple[Level, str]]:
        """All kinds that were found, sorted: errors before warnings, then by code."""
        return sorted(self.counts)

    def total(self, level: Level) -> int:
        """The number of findings of this level."""
        return sum(count for (kind_level, _), count in self.counts.items() if kind_level == level)

    def shown(self) -> Iterator[Found]:
        """The first findings of each kind."""
        for kind in self.kinds():
            yield from self.first[kind]


def row_location(source: Source, number: int, parsed: Row | Problem) -> RowLocation:
    """The location of row `number`, counted over all files of the source; `parsed` may be why it could not be parsed."""
    if isinstance(parsed, Row):
        return RowLocation(parsed.source, parsed.index, parsed.line)
    file = source.file_of(number)
    first = bisect.bisect_left(range(len(source)), file, key=source.file_of)
    line = _LINE.search(parsed.where or "")
    return RowLocation(source.paths[file], number - first, int(line[1]) if line else number - first + 1)
