"""What data.max_length takes away: targets lost over all rows, the longest row, and the max_length that would lose less.

Exact to the next 64 tokens; memory is one count for each 64 tokens of the longest row.
"""

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llamahome.config.schema import DataConfig
from llamahome.data.text.targets import Encoded
from llamahome.errors import Problem

_LENGTH = re.compile(r"data\.max_length=(\d+)")


@dataclass
class Losses:
    """Counts over many rows; adds up over shards and processes."""

    targets: int = 0
    """Of all rows, before anything was cut."""
    lost: int = 0
    """Targets that are in no example."""
    rows: int = 0
    """Rows that lost some."""
    longest_tokens: int = 0
    longest_where: str = ""
    regained: dict[int, int] = field(default_factory=dict)
    """max_length -> how many of the lost targets come back when it is at least that."""

    def add(self, encoded: Encoded, where: str) -> None:
        """Count one row that was read at `where`."""
        self.targets += encoded.num_targets
        if encoded.num_tokens > self.longest_tokens:
            self.longest_tokens, self.longest_where = encoded.num_tokens, where
        if encoded.lost:
            self.rows += 1
        for length, count in encoded.lost:
            self.lost += count
            self.regained[length] = self.regained.get(length, 0) + count

    def merge(self, other: "Losses") -> None:
        """Count the rows of another part of the data, which comes after this one."""
        self.targets += other.targets
        self.lost += other.lost
        self.rows += other.rows
        if other.longest_tokens > self.longest_tokens:
            self.longest_tokens, self.longest_where = other.longest_tokens, other.longest_where
        for length, count in other.regained.items():
            self.regained[length] = self.regained.get(length, 0) + count

    @property
    def share(self) -> float:
        """Lost targets over all targets."""
        return self.lost / max(1, self.targets)

    def length_that_loses(self, share: float) -> int:
        """The smallest max_length, to the next 64, with which at most this share of the targets is lost."""
        lost = 0
        for length in sorted(self.regained, reverse=True):
            lost += self.regained[length]
            if lost > share * self.targets:
                return min(length, self.longest_tokens)
        return 0

    def judge(self, data: DataConfig, path: str) -> Problem | None:
        """The problem that stops a run when more is lost than data.max_lost_share allows."""
        if self.lost <= data.max_lost_share * self.targets:
            return None
        how = "left out" if data.on_overlong == "drop" else "cut"
        rows = "1 row is" if self.rows == 1 else f"{self.rows:,} rows are"
        message = (
            f"{rows} longer than data.max_length {data.max_length:,} and would be {how}: {self.lost:,} of {self.targets:,} targets "
            f"({_percent(self.share)}) would be lost; data.max_lost_share allows {_percent(data.max_lost_share)}; "
            f"the longest row has {self.longest_tokens:,} tokens ({self.longest_where})"
        )
        fitting = self.length_that_loses(data.max_lost_share)
        whole = f"--set data.max_length={self.longest_tokens} keeps all"
        enough = f"--set data.max_length={fitting} is enough; {whole}" if fitting < self.longest_tokens else whole
        hint = f"{enough}; --set data.max_lost_share={self._accepted()} goes on"
        return Problem(code="data.too-much-lost", message=message, where=path, hint=hint)

    def as_json(self) -> dict[str, Any]:
        """For a file; `from_json` reads it."""
        return asdict(self) | {"regained": {str(length): count for length, count in self.regained.items()}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Losses":
        """What `as_json` wrote."""
        return cls(**{**value, "regained": {int(length): count for length, count in value["regained"].items()}})

    def _accepted(self) -> str:
        """The share that is lost, rounded up to three places."""
        return f"{min(1.0, -(-self.lost * 1000 // max(1, self.targets)) / 1000):g}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else "less than 0.1%"


def within_positions(problem: Problem, positions: int | None) -> Problem:
    """The same without help that asks for a max_length beyond the positions of the model."""
    if positions is None or problem.hint is None:
        return problem
    parts = [part for part in problem.hint.split("; ") if all(int(length) <= positions for length in _LENGTH.findall(part))]
    return replace(problem, hint="; ".join(parts) or None)
