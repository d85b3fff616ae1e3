"""The learning rate of a run that becomes longer: no jump up, zero at the end, the same function of the step after any resume."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.training.rates import Curve, go_on, planned
from llamahome.training.schedule import learning_rate, warmup_steps

SHAPES = st.sampled_from(["cosine", "linear", "constant"])
FALLING = st.sampled_from(["cosine", "linear"])


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 200), st.floats(0, 0.9), st.floats(1e-6, 1.0))
def test_a_planned_curve_is_the_schedule_to_the_bit(shape: str, horizon: int, warmup: float, peak: float) -> None:
    curve, steps = planned(peak=peak, horizon=horizon, warmup=warmup, shape=shape), warmup_steps(warmup, horizon)
    assert [curve.rate(step) for step in range(horizon)] == [
        learning_rate(step, peak=peak, horizon=horizon, warmup=steps, shape=shape) for step in range(horizon)
    ]


@settings(deadline=None, max_examples=100)
@given(FALLING, st.integers(2, 100), st.integers(1, 100), st.floats(0, 0.5), st.data())
def test_what_is_kept_never_rises_after_the_warm_up_and_ends_at_zero(
    shape: str, horizon: int, more: int, warmup: float, data: st.DataObject
) -> None:
    old = planned(peak=1.0, horizon=horizon, warmup=warmup, shape=shape)
    step = data.draw(st.integers(1, horizon))
    new = go_on(old, planned(peak=1.0, horizon=horizon + more, warmup=warmup, shape=shape), step, on_extend="keep")
    rates = [old.rate(number) for number in range(step)] + [new.rate(number) for number in range(step, horizon + more)]
    rise = rates[: old.warmup]
    assert rise == [old.rate(number) for number in range(old.warmup)], "a warm-up is finished as it was begun"
    assert rates[old.warmup :] == sorted(rates[old.warmup :], reverse=True) and rates[-1] > 0
    assert new.rate(horizon + more) == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(FALLING, st.integers(4, 60), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
def test_a_second_resume_and_an_older_checkpoint_follow_the_same_curve(
    shape: str, horizon: int, extensions: list[int], data: st.DataObject
) -> None:
    curve, step = planned(peak=0.3, horizon=horizon, warmup=2, shape=shape), 0
    for more in extensions:
        step = data.draw(st.integers(step + 1, curve.horizon - 1)) if step + 1 < curve.horizon else step
        horizon += more
        fresh = planned(peak=0.3, horizon=horizon, warmup=2, shape=shape)
        curve = go_on(curve, fresh, step, on_extend="keep")
        saved = Curve(**json.loads(json.dumps(asdict(curve))))
        assert all(go_on(saved, fresh, later, on_extend="keep") == curve for later in range(step, horizon))


def test_a_constant_rate_and_a_smaller_horizon_are_kept_too() -> None:
    constant = planned(peak=0.1, horizon=10, warmup=0, shape="constant")
    assert go_on(constant, replace(constant, horizon=20), 10, on_extend="keep").rate(15) == 0.1
    cosine = planned(peak=0.1, horizon=100, warmup=0, shape="cosine")
    shorter = go_on(cosine, replace(cosine, horizon=50), 40, on_extend="keep")
    assert cosine.rate(39) > shorter.rate(40) > shorter.rate(49) and shorter.rate(50) == pytest.approx(0, abs=1e-12)


def test_another_peak_scales_every_rate_to_come() -> None:
    old = planned(peak=0.1, horizon=10, warmup=2, shape="cosine")
    new = go_on(old, replace(old, peak=0.01, horizon=20), 5, on_extend="keep")
    same = go_on(old, replace(old, horizon=20), 5, on_extend="keep")
    assert [new.rate(step) for step in range(5, 20)] == pytest.approx([same.rate(step) / 10 for step in range(5, 20)])


def test_a_longer_warm_up_is_obeyed_until_the_warm_up_is_over() -> None:
    old = planned(peak=1.0, horizon=100, warmup=10, shape="linear")
    new = replace(old, warmup=20, begin=20)
    assert go_on(old, new, 5, on_extend="keep", warmup_changed=True).rate(14) == 0.75
    assert go_on(old, new, 30, on_extend="keep", warmup_changed=True) == old


def test_replan_is_the_curve_of_a_run_planned_to_the_new_end() -> None:
    old, new = (planned(peak=0.1, horizon=horizon, warmup=0.03, shape="cosine") for horizon in (10, 40))
    kept = go_on(old, new, 10, on_extend="keep")
    assert go_on(old, new, 10, on_extend="replan") == go_on(kept, new, 15, on_extend="replan") == new != kept
