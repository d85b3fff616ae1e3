"""The learning rate and what is due are functions of the step: tables, borders, and no rounding that moves them."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.training.schedule import Due, evaluations_within, learning_rate, warmup_steps
from llamahome.units import Interval, parse_interval

SHAPES = ("cosine", "linear", "constant")


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
@given(st.floats(0.01, 0.5), st.integers(1, 5000), st.floats(1, 1e9), st.integers(1, 10**8))
def test_evaluations_take_their_share_of_the_work_at_most(share: float, horizon: int, train_tokens: float, eval_tokens: int) -> None:
    every = evaluations_within(share, horizon=horizon, train_tokens=train_tokens, eval_tokens=eval_tokens)
    times = horizon // every.value
    assert every.unit == "steps" and every.value == int(every.value) >= 1 and times <= 10
    assert times <= 1 or times * eval_tokens / 3 <= share * train_tokens * (1 + 1e-9)
    assert every.value <= horizon, "a run is evaluated at least once"


def test_evaluations_in_numbers() -> None:
    assert str(evaluations_within(0.1, horizon=100, train_tokens=1e6, eval_tokens=1000)) == "10 steps"
    assert str(evaluations_within(0.1, horizon=100, train_tokens=1e6, eval_tokens=100_000)) == "34 steps"
    assert str(evaluations_within(0.1, horizon=100, train_tokens=1e6, eval_tokens=10**7)) == "100 steps"
