"""The learning rate and what is due, as pure functions of the step: nothing to save, nothing to drift on resume."""

import math
import time
from collections.abc import Callable
from typing import Literal

from llamahome.units import Interval

Shape = Literal["cosine", "linear", "constant"]


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


def evaluations_within(share: float, *, horizon: int, train_tokens: float, eval_tokens: int, most: int = 10) -> Interval:
    """How often to evaluate so that it takes at most `share` of the work; a forward pass is a third of a training pass."""
    affordable = int(share * 3 * train_tokens / max(1, eval_tokens))
    count = max(1, min(most, affordable))
    return Interval(max(1, math.ceil(horizon / count)), "steps")
