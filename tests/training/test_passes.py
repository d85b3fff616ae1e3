"""Passes and batch size that nobody set: whole numbers within their bounds that change smoothly with the data."""

from hypothesis import given
from hypothesis import strategies as st

from llamahome.training.passes import auto_batch_size, auto_epochs

ROWS = st.integers(1, 10**9)
PER_ROW = st.floats(0.1, 5000)


def passes(rows: int, per_row: float, batch_size: int | None = None) -> int:
    return auto_epochs(rows, per_row, batch_size=batch_size or auto_batch_size(rows))


@given(rows=ROWS, more=ROWS)
def test_the_batch_is_a_power_of_two_within_its_bounds_and_grows_with_the_rows(rows: int, more: int) -> None:
    small, large = auto_batch_size(rows), auto_batch_size(rows + more)
    assert 4 <= small <= large <= 32 and small.bit_count() == large.bit_count() == 1


@given(rows=ROWS, per_row=PER_ROW)
def test_passes_are_whole_and_from_one_to_twelve(rows: int, per_row: float) -> None:
    found = passes(rows, per_row)
    assert isinstance(found, int) and 1 <= found <= 12


@given(rows=ROWS, more=ROWS, per_row=PER_ROW, longer=st.floats(1, 100))
def test_more_to_learn_never_asks_for_more_passes(rows: int, more: int, per_row: float, longer: float) -> None:
    assert passes(rows + more, per_row) <= passes(rows, per_row)
    assert passes(rows, per_row * longer) <= passes(rows, per_row)


@given(rows=ROWS, per_row=PER_ROW, batch=st.integers(1, 4096), more=st.integers(0, 4096))
def test_a_larger_batch_than_the_rule_gets_no_fewer_passes(rows: int, per_row: float, batch: int, more: int) -> None:
    assert passes(rows, per_row, batch) <= passes(rows, per_row, batch + more) <= 24
    assert passes(rows, per_row, min(batch, auto_batch_size(rows))) == passes(rows, per_row)


@given(rows=st.integers(1, 10**6), epochs=st.floats(0.01, 100), more=st.floats(0, 100))
def test_given_passes_make_the_batch_at_most_smaller_and_only_to_take_steps(rows: int, epochs: float, more: float) -> None:
    small, large, free = (auto_batch_size(rows, epochs=each) for each in (epochs, epochs + more, None))
    assert 1 <= small <= large <= free
    assert small == free or rows * epochs < 24 * 2 * small, "it needs not be so small"
    assert small == 1 or rows * epochs >= 24 * small
