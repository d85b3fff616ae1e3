"""The learning rate of a whole run, also of one that was made longer on the way: a pure function of the step.

A run that goes on with another end keeps its rate (`go_on`): the new stretch begins at what the last step had, and falls to zero at the new
end. Where the stretch begins, and how high, is all that a checkpoint has to remember. The height is a share of the peak, so that another
training.learning_rate scales every rate to come.
"""

from dataclasses import dataclass, replace
from typing import Literal

from llamahome.training.schedule import Shape, learning_rate, warmup_steps

OnExtend = Literal["keep", "replan"]


@dataclass(frozen=True)
class Curve:
    """Rates from the warm-up to `horizon`, where cosine and linear reach zero."""

    peak: float
    horizon: int
    shape: Shape
    warmup: int
    """Steps."""
    begin: int
    """Update, counted from 0, from which the rate falls: `warmup` unless the run was made longer or shorter."""
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


def planned(*, peak: float, horizon: int, warmup: float, shape: Shape) -> Curve:
    """The curve of a run that is planned as a whole; `warmup` as in `warmup_steps`."""
    steps = warmup_steps(warmup, horizon)
    return Curve(peak, horizon, shape, steps, steps)


def go_on(old: Curve, new: Curve, step: int, *, on_extend: OnExtend, warmup_changed: bool = False) -> Curve:
    """The curve after `step` updates along `old`, when the settings by now plan `new`.

    keep: from the rate of the last update to zero at the new horizon; a warm-up that is not over is finished first, as it was begun.
    A peak that changed scales what is left, and a warm-up of another length is obeyed as far as it is not over. replan: `new`.
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
