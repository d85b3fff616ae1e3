"""The rule of pruning: noise alone never prunes, and what does not learn is pruned."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from llamahome.sweep.rungs import pruned, rung_step

LOSSES = st.dictionaries(st.integers(0, 20), st.lists(st.floats(0.1, 5), min_size=1, max_size=3), min_size=1, max_size=9)


@given(LOSSES, st.floats(0.001, 1))
def test_the_best_and_the_better_half_stay(losses: dict[int, list[float]], noise: float) -> None:
    worse = pruned(5.0, losses, noise=noise)
    means = {key: math.fsum(values) / len(values) for key, values in losses.items()}
    assert min(means, key=lambda key: means[key]) not in worse
    assert len(worse) <= len(losses) // 2


@given(LOSSES, st.floats(0.001, 1), st.randoms(use_true_random=False))
def test_the_order_of_trials_decides_nothing(losses: dict[int, list[float]], noise: float, source: random.Random) -> None:
    items = list(losses.items())
    source.shuffle(items)
    assert pruned(5.0, dict(items), noise=noise) == pruned(5.0, losses, noise=noise)


def test_the_eventual_best_of_curves_that_cross_within_the_noise_is_never_pruned() -> None:
    """Curves 4 - gain * (1 - exp(-t / tau)) with noise: those with a larger gain learn up to twice as slowly."""
    for seed in range(300):
        source = random.Random(seed)
        curves = {key: (source.uniform(0.5, 2.0), source.uniform(0.15, 0.3)) for key in range(8)}
        best = max(curves, key=lambda key: curves[key][0] * (1 - math.exp(-1 / curves[key][1])))
        for share in (0.25, 0.5):
            losses = {k: [4 - gain * (1 - math.exp(-share / tau)) + source.gauss(0, 0.01)] for k, (gain, tau) in curves.items()}
            assert best not in pruned(4.0, losses, noise=0.02)


def test_what_does_not_learn_or_diverged_is_pruned() -> None:
    assert pruned(4.0, {"a": [2.0], "b": [2.1], "still": [3.99], "gone": [math.inf]}, noise=0.02) == {"still", "gone"}


def test_a_rung_is_an_evaluated_step_before_the_last() -> None:
    assert rung_step([2, 4, 6, 8], 8, 0.5) == 4
    assert rung_step([8], 8, 0.5) is None
