"""Steps whose update was refused: counted, and too many in a row end the run or send it back to a checkpoint before them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from llamahome.distributed.devices import HostCopy
from llamahome.errors import Diverged, Problem
from llamahome.training.spikes import NOT_FINITE

Positions = tuple[int, int]
"""Begin and end of what a step consumed."""


@dataclass(frozen=True)
class Refused:
    """A step whose update was not applied."""

    positions: Positions
    reason: float
    """NOT_FINITE or SPIKE."""

    @property
    def why(self) -> str:
        """For people."""
        return "loss or gradient is not finite" if self.reason == NOT_FINITE else "loss or gradient leaps far above the steps before"


@dataclass(frozen=True)
class Streak:
    """Refused steps in a row."""

    steps: tuple[tuple[int, Positions], ...]
    before: tuple[int, Positions] | None
    """The applied step before them; None if another process did it."""


class RunDiverged(Diverged):
    """Too many updates in a row were refused. All ranks raise it after the same step."""

    def __init__(self, problems: Problem | Sequence[Problem], streak: Streak | None = None) -> None:
        super().__init__(problems)
        self.streak = streak


@dataclass
class BadSteps:
    """Counts refused updates without reading the device in every step: flags are kept, and read when a line of metrics is written."""

    most_in_row: int
    total: int
    """Over the whole run."""
    now: Streak = Streak((), None)
    """The refused steps since the last one that was applied."""
    too_long: Streak | None = None
    """The first streak of `most_in_row` steps; good steps may follow before the flags are read."""
    _noted: list[tuple[int, Positions, Tensor]] = field(default_factory=list)
    _unread: list[tuple[list[tuple[int, Positions]], HostCopy]] = field(default_factory=list)

    def note(self, step: int, positions: Positions, refused: Tensor) -> None:
        """Keep the flag of `step`, which consumed `positions`."""
        self._noted.append((step, positions, refused))

    def cut(self) -> None:
        """Start to copy the flags noted since the last cut to the host; waits for nothing."""
        steps = [(step, positions) for step, positions, _ in self._noted]
        if steps:
            self._unread.append((steps, HostCopy([flag for _, _, flag in self._noted])))
        self._noted.clear()

    def read(self) -> dict[int, Refused]:
        """The refused steps of the oldest cut that is not read yet. Waits for the device."""
        steps, flags = self._unread.pop(0) if self._unread else ([], None)
        bad = {}
        for (step, positions), flag in zip(steps, flags.read() if flags is not None else [], strict=True):
            if not flag:
                self.now = Streak((), (step, positions))
                continue
            bad[step] = Refused(positions, flag)
            self.now = Streak((*self.now.steps, (step, positions)), self.now.before)
            if len(self.now.steps) >= self.most_in_row and (self.too_long is None or self.too_long.steps[0] == self.now.steps[0]):
                self.too_long = self.now
        self.total += len(bad)
        return bad

    def raise_if_diverged(self, rows: Sequence[str], advice: str) -> None:
        """Raise RunDiverged after `most_in_row` refused updates in a row; `rows` are those of the last one, `advice` is what to type."""
        if self.too_long is None:
            return
        found = f"loss or gradient was not finite, or leapt far up, in {len(self.too_long.steps)} steps in a row"
        raise RunDiverged(
            Problem(
                code="training.diverged",
                message=f"{found}; no such update was applied; rows of the last one: {', '.join(rows[:8])}",
                where="training.max_bad_steps",
                hint=f"{advice}   (and look at those rows)",
            ),
            self.too_long,
        )

    def values(self) -> dict[str, Any]:
        """What a checkpoint saves, as JSON values: a run that stops between two bad steps goes on counting."""
        as_lists: dict[str, Any] = json.loads(json.dumps(asdict(self.now)))  # so that it equals what is read again
        return as_lists

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `values` returned."""
        steps = tuple((step, (begin, end)) for step, (begin, end) in saved["steps"])
        before = saved["before"]
        self.now = Streak(steps, (before[0], (before[1][0], before[1][1])) if before else None)
