"""Positions that are passed over never come again, all others come in their order, and the position stays one number."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llamahome.data.steps.mixture import plain_order
from llamahome.data.steps.order import joined, pass_over, positions_of

STEPS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)).map(lambda step: (step[0], sum(step))), max_size=5)
LATER = np.arange(120)


@given(STEPS)
def test_what_is_passed_over_is_left_out_and_nothing_else(steps: list[tuple[int, int]]) -> None:
    passed = joined(steps)
    out = {position for begin, end in steps for position in range(begin, end)}
    assert positions_of(LATER, passed).tolist() == [each for each in range(200) if each not in out][: len(LATER)]
    assert joined(passed) == passed == joined([list(each) for each in passed])


@given(STEPS, STEPS)
def test_rows_of_later_steps_are_those_that_were_consumed(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    """A second time, steps are counted with the first rows left out already."""
    passed = joined(first)
    seen = positions_of(LATER, passed)
    consumed = {int(seen[number]) for begin, end in second for number in range(begin, end)}
    both = pass_over(passed, second)
    assert positions_of(LATER, both).tolist() == [int(each) for each in positions_of(np.arange(200), passed) if each not in consumed][:120]


def test_an_order_passes_over_positions_and_not_rows() -> None:
    """The rows come again in the next epoch."""
    whole = plain_order(10)
    order = replace(whole, passed=((3, 5),))
    expected = whole.rows_at(np.array([0, 1, 2, *range(5, 20)]), seed=1)
    assert order.rows_at(np.arange(18), seed=1).tolist() == expected.tolist()
    assert sorted(order.rows_at(np.arange(8, 18), seed=1)) == list(range(10))
