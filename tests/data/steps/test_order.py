"""The order of rows is a permutation per epoch that depends only on position, size and seed and is the same in every version."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.order import row_at

from llamahome.data.steps.order import rows_at

sizes = st.integers(1, 700)
seeds = st.integers(0, 2**63 - 1)


@settings(deadline=None, max_examples=80)
@given(sizes, seeds, st.integers(0, 5))
def test_an_epoch_holds_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * num_rows, (epoch + 1) * num_rows)
    assert sorted(rows_at(positions, num_rows=num_rows, seed=seed).tolist()) == list(range(num_rows))


@settings(deadline=None, max_examples=60)
@given(sizes, seeds, st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_many_positions_at_once_equal_one_by_one(num_rows: int, seed: int, positions: list[int]) -> None:
    one_by_one = [row_at(position, num_rows=num_rows, seed=seed) for position in positions]
    assert rows_at(np.array(positions, np.int64), num_rows=num_rows, seed=seed).tolist() == one_by_one


def test_golden_values_never_change() -> None:
    """A change here would silently change the order of every run that is resumed."""
    assert rows_at(np.arange(20), num_rows=10, seed=0).tolist() == GOLDEN_TEN
    positions = np.array([0, 1, 1_000_002, 1_000_003, 10**9])
    assert rows_at(positions, num_rows=1_000_003, seed=7).tolist() == GOLDEN_MILLION


GOLDEN_TEN = [0, 3, 6, 2, 8, 7, 5, 9, 1, 4, 1, 9, 7, 6, 4, 5, 3, 0, 2, 8]
GOLDEN_MILLION = [848533, 364121, 487623, 162005, 670199]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(rows_at(np.arange(epoch * 50, epoch * 50 + 50), num_rows=50, seed=seed).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_every_row_is_about_equally_often_first() -> None:
    firsts = np.bincount([rows_at(np.array([0]), num_rows=7, seed=seed)[0] for seed in range(3500)], minlength=7)
    assert (np.abs(firsts - 500) < 120).all()


def test_a_place_outside_is_refused() -> None:
    for position, num_rows in ((-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="no such positions"):
            rows_at(np.array([position]), num_rows=num_rows, seed=0)


def test_a_far_position_is_as_near_as_any() -> None:
    """Up to 1e18 positions away, one by one and in one go; speed is a matter of benchmarks/streaming_start.py."""
    far = [10**9, 10**15, 10**18]
    assert rows_at(np.array(far), num_rows=5_000_000, seed=1).tolist() == [row_at(each, num_rows=5_000_000, seed=1) for each in far]


@pytest.mark.slow
def test_a_million_times_an_epoch_is_a_permutation() -> None:
    """1e6 draws of (rows, seed, epoch); small sizes, where a mistake in the arithmetic would show, come most often."""
    source = np.random.default_rng(20261122)
    for _ in range(2_000):
        num_rows = int(source.integers(1, source.choice((40, 40, 40, 400, 3000))))
        seed, epochs = int(source.integers(0, 2**63)), source.integers(0, 2**31, 500)
        rows = rows_at((epochs[:, None] * num_rows + np.arange(num_rows)).ravel(), num_rows=num_rows, seed=seed)
        assert (np.sort(rows.reshape(500, num_rows), axis=1) == np.arange(num_rows)).all(), (num_rows, seed)
