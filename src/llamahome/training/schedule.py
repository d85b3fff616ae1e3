"""The learning rate and what is due, as pure functions of the step: nothing to save, nothing to drift on resume."""

import bisect
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from llamahome.units import Interval

Shape = Literal["cosine", "linear", "constant"]
_SHARE, _FEWEST_ROWS, _USUALLY, _MOST = 0.1, 16, 2, 10
"""The rule of evaluation.rows and evaluation.every auto, as their texts in config/schema.py say it."""


def warmup_steps(warmup: float, horizon: int) -> int:
    """Steps of warm-up: a share of `horizon` (rounded up) when below 1, else a count."""
    return math.ceil(round(warmup * horizon, 6)) if warmup < 1 else min(int(warmup), horizon)


def learning_rate(step: int, *, peak: float, horizon: int, warmup: int, shape: Shape) -> float:
    """Rate of update number `step` (from 0). Rises linearly over `warmup` updates to `peak`, then falls towards zero at `horizon`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, horizon - warmup))
    return peak * (1 - progress) if shape == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))


class Due:
    """Says when something that happens every so often is due. Steps and epochs depend on the step alone; seconds on the clock."""

    def __init__(self, every: Interval, *, steps_per_epoch: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._gap = every.value * (steps_per_epoch if every.unit == "epochs" else 1.0)
        self._last = clock()

    def after(self, step: int) -> bool:
        """Whether it is due after `step` updates; asked once per step."""
        if self._every.unit == "seconds":
            if self._clock() - self._last < self._every.value:
                return False
            self._last = self._clock()
            return True
        return self._times(step) > self._times(step - 1)

    def _times(self, step: int) -> int:
        """How often it has been due; the small number keeps 17 / 1.7 from being 9.99."""
        return math.floor(step / self._gap + 1e-6)


@dataclass(frozen=True)
class EvaluationPlan:
    """How many held-out rows are evaluated, and how often."""

    rows: int
    every: Interval
    share: float
    """What all evaluations together cost, over the cost of training."""


def plan_evaluations(
    row_tokens: Iterable[int],
    *,
    work: float,
    answers: float,
    horizon: int,
    steps_per_epoch: float,
    rows: int | Literal["auto"],
    every: Interval | None,
) -> EvaluationPlan:
    """Let all evaluations of a run take at most a tenth of its `work`: that before training, those in between and that at the end.

    Costs are counted in tokens of a forward pass: `row_tokens` of each held-out row, those first that are taken first, `answers` for the
    sample answers of one evaluation. Rows: as many as are afforded at the frequency that was set, and else four times, but never fewer
    than 16 of them. Frequency, where none was set: as often as those rows are afforded, up to ten times in between.
    """
    upto, budget, most = [0, *itertools.accumulate(map(int, row_tokens))], _SHARE * work, max(0, horizon - 1)
    between = min(_USUALLY, most) if every is None else _times_between(every, horizon, steps_per_epoch)
    afforded = bisect.bisect_right(upto, max(0.0, budget / (2 + between) - answers)) - 1
    taken = min(len(upto) - 1, max(afforded, _FEWEST_ROWS) if rows == "auto" else rows)
    cost = upto[taken] + answers
    if every is None:
        between = max(0, min(_MOST, most, int(budget / max(1.0, cost)) - 2))
        every = Interval(math.ceil(horizon / (between + 1)), "steps")
        between = _times_between(every, horizon, steps_per_epoch)
    return EvaluationPlan(taken, every, (2 + between) * cost / max(1.0, work))


def _times_between(every: Interval, horizon: int, steps_per_epoch: float) -> int:
    """How often it is due before the last step; by the clock nobody knows before, so that counts as usual."""
    if every.unit == "seconds":
        return min(_USUALLY, max(0, horizon - 1))
    gap = every.value * (steps_per_epoch if every.unit == "epochs" else 1.0)
    return min(max(0, horizon - 1), math.floor((horizon - 1) / gap + 1e-6))
