"""What data.max_length cuts: the targets lost over all rows, the longest row, and the max_length that would lose less.

Lengths are rounded up to 64 tokens; memory is one count per 64 tokens of the longest row.
"""

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llamahome.config.schema import DataConfig
from llamahome.data.text.targets import Encoded
from llamahome.errors import Problem

_LENGTH = re.compile(r"data\.max_length=(\d+)")


@dataclass
class Truncation:
    """Counts over rows that can be merged over shards and processes."""

    targets: int = 0
    """The targets of all rows before anything was cut."""
    lost: int = 0
    """Targets that are in no example."""
    rows: int = 0
    """Rows that lost targets."""
    longest_tokens: int = 0
    longest_where: str = ""
    regained: dict[int, int] = field(default_factory=dict)
    """How many of the lost targets would be kept if max_length were at least the key."""

    def add(self, encoded: Encoded, where: str) -> None:
        """Count the row at `where`."""
        self.targets += encoded.num_targets
        if encoded.needed > self.longest_tokens:
            self.longest_tokens, self.longest_where = encoded.needed, where
        if encoded.lost:
            self.rows += 1
        for length, count in encoded.lost:
            self.lost += count
            self.regained[length] = self.regained.get(length, 0) + count

    def merge(self, other: "Truncation") -> None:
        """Add the counts of rows that come after these."""
        self.targets += other.targets
        self.lost += other.lost
        self.rows += other.rows
        if other.longest_tokens > self.longest_tokens:
            self.longest_tokens, self.longest_where = other.longest_tokens, other.longest_where
        for length, count in other.regained.items():
            self.regained[length] = self.regained.get(length, 0) + count

    @property
    def share(self) -> float:
        """The share of the targets that is lost."""
        return self.lost / max(1, self.targets)

    def length_that_loses(self, share: float) -> int:
        """The smallest max_length, rounded up to 64, that loses at most this share of the targets."""
        lost = 0
        for length in sorted(self.regained, reverse=True):
            lost += self.regained[length]
            if lost > share * self.targets:
                return min(length, self.longest_tokens)
        return 0

    def judge(self, data: DataConfig, path: str) -> Problem | None:
        """The problem that stops a run if more is lost than data.max_lost_share allows."""
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
        hint = f"{enough}; --set data.max_lost_share={self._rounded_share()} goes on"
        return Problem(code="data.too-much-lost", message=message, where=path, hint=hint)

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON values; `from_json` reads them."""
        return asdict(self) | {"regained": {str(length): count for length, count in self.regained.items()}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Truncation":
        """The counts that `as_json` gave."""
        return cls(**{**value, "regained": {int(length): count for length, count in value["regained"].items()}})

    def _rounded_share(self) -> str:
        """The lost share, rounded up to three places, as a setting."""
        return f"{min(1.0, -(-self.lost * 1000 // max(1, self.targets)) / 1000):g}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else "less than 0.1%"


def within_positions(problem: Problem, positions: int | None) -> Problem:
    """The problem without hints at a max_length that exceeds the positions of the model."""
    if positions is None or problem.hint is None:
        return problem
    parts = [part for part in problem.hint.split("; ") if all(int(length) <= positions for length in _LENGTH.findall(part))]
    return replace(problem, hint="; ".join(parts) or None)
