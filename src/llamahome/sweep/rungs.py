"""Which settings of a sweep are plainly worse and stop early: a pure rule of held-out losses, in rounds of successive halving.

At each rung all trials wait for each other, so what is pruned depends on losses alone and never on the order in which trials end.
The learning-rate schedule of a trial is always that of its full length.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

RUNGS = (0.25, 0.5)
"""Shares of a trial's steps after which it is compared."""
FEWEST_SETTINGS = 4
"""Among fewer settings nothing is pruned."""
LEAST_SHARE_OF_GAIN = 0.5
"""A setting that has lowered the loss by at least this share of the best one's gain may still win and stays."""

Key = TypeVar("Key", bound=Hashable)


def pruned(first: float, losses: Mapping[Key, Sequence[float]], *, noise: float) -> set[Key]:
    """The settings to stop, of those in `losses`: setting -> held-out loss at this rung of each of its seeds, in nats per target.

    `first` is the loss before training, `noise` that of one evaluation. A setting is pruned if all of this holds: its mean is not in the
    better half; it is worse than the best by more than the noise of a difference, to which the range over the seeds of both is added;
    and it has gained less than half of what the best has gained. A loss that is not finite counts as no gain.
    """
    if len(losses) < FEWEST_SETTINGS:
        return set()
    means = {key: _mean(values) for key, values in losses.items()}
    order = sorted(means.values())
    best = order[0]
    if not math.isfinite(best) or best >= first:
        return set()
    half = order[(len(order) + 1) // 2 - 1]
    range_of = {key: max(values) - min(values) if math.isfinite(means[key]) else 0.0 for key, values in losses.items()}
    best_range = min(range_of[key] for key in means if means[key] == best)
    worse = set()
    for key, mean in means.items():
        beyond_noise = mean - best > noise * math.sqrt(2) + best_range + range_of[key]
        if mean > half and beyond_noise and first - mean < LEAST_SHARE_OF_GAIN * (first - best):
            worse.add(key)
    return worse


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values and all(math.isfinite(value) for value in values) else math.inf


def rung_step(evaluated: Sequence[int], horizon: int, share: float) -> int | None:
    """The first evaluated step at or after `share` of `horizon`, before the last step; None if it has not been reached."""
    return next((step for step in sorted(evaluated) if share * horizon <= step < horizon and step > 0), None)
