"""The learning rate and what is due are functions of the step, also after a run was extended: no jump up, zero at the end."""

import itertools
import json
import math
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.training.schedule import Curve, Due, learning_rate, planned_curve, resumed_curve, warmup_steps
from llamahome.units import Interval, parse_interval

SHAPES = ("cosine", "linear", "constant")
ANY_SHAPE = st.sampled_from(["cosine", "linear", "constant"])
FALLING = st.sampled_from(["cosine", "linear"])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, *((1 + math.cos(math.pi * n / 8)) / 2 for n in range(1, 8))]),
    ],
)
def test_the_table_of_twelve_steps_with_four_of_warm_up(shape: str, expected: list[float]) -> None:
    assert [learning_rate(step, peak=1.0, horizon=12, warmup=4, shape=shape) for step in range(12)] == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(1, 400), st.integers(0, 400), st.floats(1e-6, 1.0))
def test_it_rises_to_the_peak_and_never_rises_again(shape: str, horizon: int, warmup: int, peak: float) -> None:
    warmup = min(warmup, horizon)
    rates = [learning_rate(step, peak=peak, horizon=horizon, warmup=warmup, shape=shape) for step in range(horizon)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates) and max(rates) == pytest.approx(peak)
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    last = learning_rate(horizon, peak=peak, horizon=horizon, warmup=min(warmup, horizon - 1), shape=shape)
    assert last == (peak if shape == "constant" else pytest.approx(0, abs=1e-12 * peak))
    if warmup:
        assert rates[0] == pytest.approx(peak / warmup)


@pytest.mark.parametrize(
    ("warmup", "horizon", "expected"),
    [(0, 100, 0), (0.03, 100, 3), (0.03, 101, 4), (0.03, 1, 1), (0.07, 100, 7), (0.29, 100, 29), (5, 100, 5), (500, 100, 100), (1, 1, 1)],
)
def test_warm_up_is_a_share_rounded_up_or_a_count(warmup: float, horizon: int, expected: int) -> None:
    assert warmup_steps(warmup, horizon) == expected


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 64), st.sampled_from(["1", "2", "0.5", "0.1", "3", "0.25", "1.5"]))
def test_epochs_are_due_at_the_first_step_that_completes_them(rows: int, batch_size: int, epochs: str) -> None:
    due, every = Due(parse_interval(f"{epochs} epochs"), steps_per_epoch=rows / batch_size), Fraction(epochs)
    done = [Fraction(step * batch_size, rows) // every for step in range(301)]
    assert [due.after(step) for step in range(1, 301)] == [now > before for before, now in itertools.pairwise(done)]


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (7, [7]), (8, [])])
def test_steps_are_due_at_their_multiples(every: int, expected: list[int]) -> None:
    due = Due(Interval(every, "steps"), steps_per_epoch=2.5)
    assert [step for step in range(1, 8) if due.after(step)] == expected
    assert [step for step in (7, 3, 6, 6, 1) if due.after(step)] == [step for step in (7, 3, 6, 6, 1) if step in expected], (
        "it has a memory"
    )


def test_seconds_are_due_by_the_clock_and_count_from_the_last_time() -> None:
    now = [100.0]
    due = Due(parse_interval("10 s"), steps_per_epoch=4, clock=lambda: now[0])
    seen = []
    for step, time in enumerate([101, 109.9, 110, 111, 119, 145, 146, 154.9, 155], 1):
        now[0] = time
        seen.append(due.after(step))
    assert seen == [False, False, True, False, False, True, False, False, True]


@settings(deadline=None, max_examples=60)
@given(ANY_SHAPE, st.integers(1, 200), st.floats(0, 0.9), st.floats(1e-6, 1.0))
def test_a_planned_curve_is_the_schedule_to_the_bit(shape: str, horizon: int, warmup: float, peak: float) -> None:
    curve, steps = planned_curve(peak=peak, horizon=horizon, warmup=warmup, shape=shape), warmup_steps(warmup, horizon)
    assert [curve.rate(step) for step in range(horizon)] == [
        learning_rate(step, peak=peak, horizon=horizon, warmup=steps, shape=shape) for step in range(horizon)
    ]


@settings(deadline=None, max_examples=100)
@given(FALLING, st.integers(2, 100), st.integers(1, 100), st.floats(0, 0.5), st.data())
def test_what_is_kept_never_rises_after_the_warm_up_and_ends_at_zero(
    shape: str, horizon: int, more: int, warmup: float, data: st.DataObject
) -> None:
    old = planned_curve(peak=1.0, horizon=horizon, warmup=warmup, shape=shape)
    step = data.draw(st.integers(1, horizon))
    new = resumed_curve(old, planned_curve(peak=1.0, horizon=horizon + more, warmup=warmup, shape=shape), step, on_extend="keep")
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
    curve, step = planned_curve(peak=0.3, horizon=horizon, warmup=2, shape=shape), 0
    for more in extensions:
        step = data.draw(st.integers(step + 1, curve.horizon - 1)) if step + 1 < curve.horizon else step
        horizon += more
        fresh = planned_curve(peak=0.3, horizon=horizon, warmup=2, shape=shape)
        curve = resumed_curve(curve, fresh, step, on_extend="keep")
        saved = Curve(**json.loads(json.dumps(asdict(curve))))
        assert all(resumed_curve(saved, fresh, later, on_extend="keep") == curve for later in range(step, horizon))


def test_a_constant_rate_and_a_smaller_horizon_are_kept_too() -> None:
    constant = planned_curve(peak=0.1, horizon=10, warmup=0, shape="constant")
    assert resumed_curve(constant, replace(constant, horizon=20), 10, on_extend="keep").rate(15) == 0.1
    cosine = planned_curve(peak=0.1, horizon=100, warmup=0, shape="cosine")
    shorter = resumed_curve(cosine, replace(cosine, horizon=50), 40, on_extend="keep")
    assert cosine.rate(39) > shorter.rate(40) > shorter.rate(49) and shorter.rate(50) == pytest.approx(0, abs=1e-12)


def test_another_peak_scales_every_rate_to_come() -> None:
    old = planned_curve(peak=0.1, horizon=10, warmup=2, shape="cosine")
    new = resumed_curve(old, replace(old, peak=0.01, horizon=20), 5, on_extend="keep")
    same = resumed_curve(old, replace(old, horizon=20), 5, on_extend="keep")
    assert [new.rate(step) for step in range(5, 20)] == pytest.approx([same.rate(step) / 10 for step in range(5, 20)])


def test_a_longer_warm_up_is_obeyed_until_the_warm_up_is_over() -> None:
    old = planned_curve(peak=1.0, horizon=100, warmup=10, shape="linear")
    new = replace(old, warmup=20, begin=20)
    assert resumed_curve(old, new, 5, on_extend="keep", warmup_changed=True).rate(14) == 0.75
    assert resumed_curve(old, new, 30, on_extend="keep", warmup_changed=True) == old


def test_replan_is_the_curve_of_a_run_planned_to_the_new_end() -> None:
    old, new = (planned_curve(peak=0.1, horizon=horizon, warmup=0.03, shape="cosine") for horizon in (10, 40))
    kept = resumed_curve(old, new, 10, on_extend="keep")
    assert resumed_curve(old, new, 10, on_extend="replan") == resumed_curve(kept, new, 15, on_extend="replan") == new != kept
