"""Our own products equal exact ones, for any sizes, stacks, ranks and numbers of threads, and read nothing outside their operands."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels, load_kernels
from llamahome.model.backends.cpu.products import Stack, adapted_product, multiplies, outer_product, product

_LOADED = load_kernels()
_ROUNDED = 4e-3
"""Relative: sums are exact to 1e-6, the result is rounded to the 8 bits of bfloat16."""
EVEN = st.integers(1, 90).map(lambda half: 2 * half)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if isinstance(_LOADED, str) or not _LOADED.has("product", torch.bfloat16):
        pytest.skip("no products of our own on this machine")
    return _LOADED


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def bordered(x: Tensor) -> Tensor:
    """The same numbers with NaN around them: whoever reads too far spoils its sums."""
    whole = torch.full((x.shape[0] + 2, x.shape[1] + 4), math.nan, dtype=x.dtype)
    whole[1:-1, 2:-2] = x
    return whole[1:-1, 2:-2]


def assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    assert found.shape == exact.shape and (found.double() - exact).norm() <= limit * exact.norm()


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 70),
    heights=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    width=EVEN,
    rank=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_products_both_ways_equal_exact_ones(kernels: Kernels, tokens: int, heights: list[int], width: int, rank: int, seed: int) -> None:
    heights[0] += sum(heights) % 2
    parts = [some(rows, width, seed=seed + place) for place, rows in enumerate(heights)]
    assert multiplies(kernels, parts)
    whole, stack = torch.cat(parts).double(), Stack(parts)
    for turned in (True, False):
        matrix = whole.t() if turned else whole
        x, bias = bordered(some(tokens, matrix.shape[0], seed=seed + 7)), torch.linspace(-1, 1, matrix.shape[1])
        exact = x.double() @ matrix + bias.double()
        assert_near(product(x, stack, turned=turned, kernels=kernels, bias=bias), exact, _ROUNDED)
        first, second = some(2 * rank, matrix.shape[0], seed=seed + 8), some(2 * rank, matrix.shape[1], seed=seed + 9)
        low, out = adapted_product(x, stack, first, second, turned=turned, kernels=kernels, bias=bias)
        assert_near(low, x.double() @ first.double().t(), _ROUNDED)
        assert_near(out, exact + low.double() @ second.double(), _ROUNDED)


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 70), wide=st.integers(1, 130), columns=st.integers(1, 130), seed=st.integers(0, 99))
def test_outer_products_equal_exact_ones(kernels: Kernels, tokens: int, wide: int, columns: int, seed: int) -> None:
    left, right = bordered(some(tokens, wide, seed=seed)), bordered(some(tokens, columns, seed=seed + 1))
    exact = left.double().t() @ right.double()
    found = outer_product(left, right, kernels=kernels)
    assert_near(found, exact, 1e-6)
    assert outer_product(left, right, kernels=kernels, out=found) is found
    assert_near(found, 2 * exact, 1e-6)


@pytest.mark.parametrize(("tokens", "rows", "width"), [(2100, 100, 3300), (5, 3300, 100), (33, 6400, 48), (4500, 50, 1700)])
def test_sums_longer_than_fit_the_cache_and_rows_beyond_one_slab_are_exact_too(
    kernels: Kernels, tokens: int, rows: int, width: int
) -> None:
    stack, matrix = Stack([some(rows, width, seed=1)]), some(rows, width, seed=1).double()
    x, y = some(tokens, width, seed=2), some(tokens, rows, seed=3)
    first, second = some(16, rows, seed=4), some(16, width, seed=5)
    assert_near(product(x, stack, turned=True, kernels=kernels), x.double() @ matrix.t(), _ROUNDED)
    low, out = adapted_product(y, stack, first, second, turned=False, kernels=kernels)
    assert_near(low, y.double() @ first.double().t(), _ROUNDED)
    assert_near(out, y.double() @ matrix + low.double() @ second.double(), _ROUNDED)
    assert_near(outer_product(y, x, kernels=kernels), y.double().t() @ x.double(), 2e-6)


def test_the_number_of_threads_does_not_change_a_bit(kernels: Kernels) -> None:
    stack, x, before = Stack([some(1000, 1600, seed=1), some(34, 1600, seed=2)]), some(403, 1600, seed=3), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            forward = product(x, stack, turned=True, kernels=kernels)
            results.append((forward, product(forward, stack, turned=False, kernels=kernels), outer_product(forward, x, kernels=kernels)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_numbers_that_are_none_stay_where_they_belong(kernels: Kernels) -> None:
    x, stack = some(20, 64, seed=1), Stack([some(50, 64, seed=2)])
    x[3, 5], x[11, 0] = math.nan, math.inf
    out = product(x, stack, turned=True, kernels=kernels)
    assert out[3].isnan().all() and not out[11].isfinite().any()
    assert out[[row for row in range(20) if row not in (3, 11)]].isfinite().all()


def test_what_our_products_do_not_take_is_known_beforehand(kernels: Kernels) -> None:
    fine = some(6, 8, seed=0)
    assert multiplies(kernels, [fine]) and not multiplies(None, [fine])
    assert not multiplies(kernels, [fine.float()])
    assert not multiplies(kernels, [some(6, 7, seed=0)]) and not multiplies(kernels, [some(5, 8, seed=0)])
    assert not multiplies(kernels, [fine.t()])
