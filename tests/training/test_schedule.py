"""The learning rate and what is due are functions of the step: tables, borders, and no rounding that moves them."""

import itertools
import math
from fractions import Fraction
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.training.schedule import Due, learning_rate, plan_evaluations, warmup_steps
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


def times_of(every: Interval, horizon: int, steps_per_epoch: float) -> int:
    """How often a run evaluates, counted as the loop does: before, whenever it is due and another step follows, at the end."""
    due = Due(every, steps_per_epoch=steps_per_epoch)
    return 2 + sum(due.after(step) for step in range(1, horizon))


intervals = st.one_of(
    st.none(),
    st.builds(Interval, st.integers(1, 3000).map(float), st.just("steps")),
    st.builds(Interval, st.floats(0.1, 3), st.just("epochs")),
)


@settings(deadline=None, max_examples=150)
@given(
    row_tokens=st.lists(st.integers(1, 2000), max_size=200),
    work=st.floats(0, 1e8),
    answers=st.sampled_from([0.0, 6400.0]),
    horizon=st.integers(1, 2000),
    steps_per_epoch=st.floats(1, 500),
    rows=st.one_of(st.just("auto"), st.integers(1, 300)),
    every=intervals,
)
def test_all_evaluations_take_a_tenth_of_the_work_or_are_the_fewest_there_can_be(
    row_tokens: list[int],
    work: float,
    answers: float,
    horizon: int,
    steps_per_epoch: float,
    rows: int | Literal["auto"],
    every: Interval | None,
) -> None:
    given = {"work": work, "answers": answers, "horizon": horizon, "steps_per_epoch": steps_per_epoch, "rows": rows, "every": every}
    found = plan_evaluations(row_tokens, **given)
    times, every_step = times_of(found.every, horizon, steps_per_epoch), horizon + 1
    cost = times * (sum(row_tokens[: found.rows]) + answers)
    assert found.share == pytest.approx(cost / max(1.0, work), rel=1e-9)
    fewest_rows = found.rows <= 16 if rows == "auto" else found.rows == min(rows, len(row_tokens))
    fewest_times = times == 2 if every is None else found.every == every
    assert cost <= 0.1 * work * (1 + 1e-9) or (fewest_rows and fewest_times)
    assert min(16, len(row_tokens)) <= found.rows <= len(row_tokens) or rows != "auto"
    assert times <= 12 or every is not None
    assert times <= every_step


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 2000), min_size=20, max_size=200), st.floats(1e3, 1e8), st.floats(1, 10), st.integers(1, 500))
def test_a_longer_run_evaluates_no_fewer_rows(row_tokens: list[int], work: float, longer: float, horizon: int) -> None:
    given = {"answers": 0.0, "horizon": horizon, "steps_per_epoch": 10.0, "rows": "auto", "every": None}
    assert plan_evaluations(row_tokens, work=work, **given).rows <= plan_evaluations(row_tokens, work=work * longer, **given).rows


@pytest.mark.parametrize(
    ("work", "rows", "every", "share"),
    [
        (1e7, 1000, "12 steps", 0.1),  # ten times 100,000 tokens
        (4e6, 1000, "34 steps", 0.1),  # four times 100,000
        (1e6, 250, "34 steps", 0.1),
        (6e4, 16, "50 steps", 0.08),  # 16 rows are 1,600 tokens, three times
        (1e4, 16, "100 steps", 0.32),  # before and at the end
    ],
)
def test_evaluations_in_numbers(work: float, rows: int, every: str, share: float) -> None:
    found = plan_evaluations([100] * 1000, work=work, answers=0.0, horizon=100, steps_per_epoch=10, rows="auto", every=None)
    assert (found.rows, str(found.every)) == (rows, every) and found.share == pytest.approx(share)


def test_nothing_held_out_is_evaluated_never() -> None:
    found = plan_evaluations([], work=1e6, answers=0.0, horizon=100, steps_per_epoch=10, rows="auto", every=None)
    assert found.rows == 0 and found.share == 0
