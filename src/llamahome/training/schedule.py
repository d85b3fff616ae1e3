"""The learning rate and what is due, as pure functions of the step: nothing to save, nothing that drifts on resume.

A run that is resumed with another end keeps its learning rate (`resumed_curve`): the rate falls from that of the last step to zero at the
new end. A checkpoint has to remember only where that fall begins, and how high. The height is a share of the peak, so that another
training.learning_rate scales every rate that follows.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from llamahome.units import Interval

Shape = Literal["cosine", "linear", "constant"]
OnExtend = Literal["keep", "replan"]


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


@dataclass(frozen=True)
class Curve:
    """Rates from the warm-up to `horizon`, where cosine and linear reach zero."""

    peak: float
    horizon: int
    shape: Shape
    warmup: int
    """Steps."""
    begin: int
    """Update, counted from 0, from which the rate falls: `warmup` unless the run was extended or shortened."""
    height: float = 1.0
    """Share of the peak at `begin`."""

    def rate(self, step: int) -> float:
        """Learning rate of update number `step`, counted from 0."""
        if step < self.warmup:
            return learning_rate(step, peak=self.peak, horizon=self.horizon, warmup=self.warmup, shape=self.shape)
        return learning_rate(step, peak=self.peak * self.height, horizon=self.horizon, warmup=self.begin, shape=self.shape)

    def share(self, step: int) -> float:
        """The rate of update number `step` over the peak."""
        return replace(self, peak=1.0).rate(step)


def planned_curve(*, peak: float, horizon: int, warmup: float, shape: Shape) -> Curve:
    """The curve of a run from its first step; `warmup` as in `warmup_steps`."""
    steps = warmup_steps(warmup, horizon)
    return Curve(peak, horizon, shape, steps, steps)


def time_limit_line(ends: str, curve: Curve, step: int) -> str:
    """`ends` and the step at which training.max_time ends a run, how high the learning rate is there, and what to type instead."""
    line = f"{ends} step {step:,} of {curve.horizon:,}"
    if curve.shape == "constant" or not step:
        return line
    return f"{line}, where the learning rate is at {curve.share(step - 1):.0%} of its peak; with --max-steps {step} it falls to zero there"


def resumed_curve(old: Curve, new: Curve, step: int, *, on_extend: OnExtend, warmup_changed: bool = False) -> Curve:
    """The curve after `step` updates along `old`, when the settings now plan `new`.

    keep: from the rate of the last update to zero at the new horizon; a warm-up that is not over is finished first, as it began.
    Another peak scales the rest, and another length of the warm-up counts if the warm-up is not over. replan: `new`.
    """
    if on_extend == "replan" or step == 0:
        return new
    warmup = new.warmup if warmup_changed else old.warmup
    rising = step < max(warmup, old.warmup)
    if (new.horizon, new.shape) == (old.horizon, old.shape) and (warmup == old.warmup or not rising):
        return replace(old, peak=new.peak)
    if rising:
        return Curve(new.peak, new.horizon, new.shape, warmup, warmup)
    return Curve(new.peak, new.horizon, new.shape, old.warmup, step - 1, old.share(step - 1))


class Due:
    """Tells when something periodic is due. Steps and epochs depend on the step alone, seconds on the clock."""

    def __init__(self, every: Interval, *, steps_per_epoch: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._gap = every.value * (steps_per_epoch if every.unit == "epochs" else 1.0)
        self._last = clock()

    def after(self, step: int) -> bool:
        """Whether it is due after `step` updates; call it once per step."""
        if self._every.unit == "seconds":
            if self._clock() - self._last < self._every.value:
                return False
            self._last = self._clock()
            return True
        return self._times(step) > self._times(step - 1)

    def _times(self, step: int) -> int:
        """How often it has been due; the small addend keeps 17 / 1.7 from being 9.99."""
        return math.floor(step / self._gap + 1e-6)
