"""Our own products equal exact ones, for any sizes, stacks, ranks and numbers of threads, and read nothing outside their operands."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.levels import CASES, kernels_at
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.products import Stack, adapted_product, multiplies, outer_product, product

EVEN = st.integers(1, 90).map(lambda half: 2 * half)


@dataclass(frozen=True)
class Ours:
    """Our products at one level in one type."""

    kernels: Kernels
    dtype: torch.dtype

    @property
    def rounded(self) -> float:
        """Relative: sums are exact to 1e-6, a result in bfloat16 is rounded to its 8 bits."""
        return 1e-6 if self.dtype == torch.float32 else 4e-3

    def some(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


@pytest.fixture(scope="module", params=CASES)
def ours(request: pytest.FixtureRequest) -> Ours:
    level, dtype = request.param
    return Ours(kernels_at(level, "product", dtype), dtype)


def bordered(x: Tensor) -> Tensor:
    """The same numbers with NaN around them: whoever reads too far spoils its sums."""
    whole = torch.full((x.shape[0] + 2, x.shape[1] + 4), math.nan, dtype=x.dtype)
    whole[1:-1, 2:-2] = x
    return whole[1:-1, 2:-2]


def assert_near(found: Tensor, exact: Tensor, limit: float, *, summed: int = 1) -> None:
    """`summed` normal numbers make a result that is as large as their root; a few results may be smaller by chance, their error is not."""
    assert found.shape == exact.shape
    assert (found.double() - exact).norm() <= limit * max(float(exact.norm()), (summed * exact.numel()) ** 0.5)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 70),
    heights=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    width=EVEN,
    rank=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_products_both_ways_equal_exact_ones(ours: Ours, tokens: int, heights: list[int], width: int, rank: int, seed: int) -> None:
    heights[0] += sum(heights) % 2
    parts = [ours.some(rows, width, seed=seed + place) for place, rows in enumerate(heights)]
    assert multiplies(ours.kernels, parts)
    whole, stack = torch.cat(parts).double(), Stack(parts)
    for turned in (True, False):
        matrix = whole.t() if turned else whole
        x, bias = bordered(ours.some(tokens, matrix.shape[0], seed=seed + 7)), torch.linspace(-1, 1, matrix.shape[1])
        exact, summed = x.double() @ matrix + bias.double(), matrix.shape[0]
        assert_near(product(x, stack, turned=turned, kernels=ours.kernels, bias=bias), exact, ours.rounded, summed=summed)
        first, second = ours.some(2 * rank, matrix.shape[0], seed=seed + 8), ours.some(2 * rank, matrix.shape[1], seed=seed + 9)
        low, out = adapted_product(x, stack, first, second, turned=turned, kernels=ours.kernels, bias=bias)
        assert_near(low, x.double() @ first.double().t(), ours.rounded, summed=summed)
        assert_near(out, exact + low.double() @ second.double(), ours.rounded, summed=summed)


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 70), wide=st.integers(1, 130), columns=st.integers(1, 130), seed=st.integers(0, 99))
def test_outer_products_equal_exact_ones(ours: Ours, tokens: int, wide: int, columns: int, seed: int) -> None:
    left, right = bordered(ours.some(tokens, wide, seed=seed)), bordered(ours.some(tokens, columns, seed=seed + 1))
    exact = left.double().t() @ right.double()
    found = outer_product(left, right, kernels=ours.kernels)
    assert_near(found, exact, 1e-6, summed=tokens)
    assert outer_product(left, right, kernels=ours.kernels, out=found) is found
    assert_near(found, 2 * exact, 1e-6, summed=4 * tokens)


@pytest.mark.parametrize(("tokens", "rows", "width"), [(2100, 100, 3300), (5, 3300, 100), (33, 6400, 48), (4500, 50, 1700)])
def test_sums_longer_than_fit_the_cache_and_rows_beyond_one_slab_are_exact_too(ours: Ours, tokens: int, rows: int, width: int) -> None:
    stack, matrix = Stack([ours.some(rows, width, seed=1)]), ours.some(rows, width, seed=1).double()
    x, y = ours.some(tokens, width, seed=2), ours.some(tokens, rows, seed=3)
    first, second = ours.some(16, rows, seed=4), ours.some(16, width, seed=5)
    assert_near(product(x, stack, turned=True, kernels=ours.kernels), x.double() @ matrix.t(), ours.rounded)
    low, out = adapted_product(y, stack, first, second, turned=False, kernels=ours.kernels)
    assert_near(low, y.double() @ first.double().t(), ours.rounded)
    assert_near(out, y.double() @ matrix + low.double() @ second.double(), ours.rounded)
    assert_near(outer_product(y, x, kernels=ours.kernels), y.double().t() @ x.double(), 2e-6)


def test_the_number_of_threads_does_not_change_a_bit(ours: Ours) -> None:
    stack, x = Stack([ours.some(1000, 1600, seed=1), ours.some(34, 1600, seed=2)]), ours.some(403, 1600, seed=3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            forward = product(x, stack, turned=True, kernels=ours.kernels)
            results.append(
                (forward, product(forward, stack, turned=False, kernels=ours.kernels), outer_product(forward, x, kernels=ours.kernels))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_numbers_that_are_none_stay_where_they_belong(ours: Ours) -> None:
    x, stack = ours.some(20, 64, seed=1), Stack([ours.some(50, 64, seed=2)])
    x[3, 5], x[11, 0] = math.nan, math.inf
    out = product(x, stack, turned=True, kernels=ours.kernels)
    assert out[3].isnan().all() and not out[11].isfinite().any()
    assert out[[row for row in range(20) if row not in (3, 11)]].isfinite().all()


def test_what_our_products_do_not_take_is_known_beforehand(ours: Ours) -> None:
    fine, single = ours.some(6, 8, seed=0), ours.dtype == torch.float32
    assert multiplies(ours.kernels, [fine]) and not multiplies(None, [fine])
    assert not multiplies(ours.kernels, [fine.double()]) and not multiplies(ours.kernels, [fine, fine.double()])
    assert multiplies(ours.kernels, [ours.some(6, 7, seed=0)]) == multiplies(ours.kernels, [ours.some(5, 8, seed=0)]) == single
    assert not multiplies(ours.kernels, [fine.t()])


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    heights=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    width=st.integers(1, 70),
    rank=st.integers(1, 9),
)
def test_float32_has_any_size(ours: Ours, tokens: int, heights: list[int], width: int, rank: int) -> None:
    if ours.dtype != torch.float32:
        pytest.skip("bfloat16 comes in pairs")
    parts = [ours.some(rows, width, seed=place) for place, rows in enumerate(heights)]
    whole, stack = torch.cat(parts).double(), Stack(parts)
    for turned in (True, False):
        matrix = whole.t() if turned else whole
        x = bordered(ours.some(tokens, matrix.shape[0], seed=7))
        first, second = ours.some(rank, matrix.shape[0], seed=8), ours.some(rank, matrix.shape[1], seed=9)
        low, out = adapted_product(x, stack, first, second, turned=turned, kernels=ours.kernels)
        assert_near(out, x.double() @ matrix + low.double() @ second.double(), ours.rounded)


@pytest.mark.parametrize("turned", [True, False])
def test_without_kernels_a_stack_of_several_means_the_same(turned: bool) -> None:
    parts = [torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows)) for rows in (5, 8)]
    matrix = torch.cat(parts).t() if turned else torch.cat(parts)
    x, bias = torch.linspace(-1, 1, 3 * matrix.shape[0]).view(3, -1), torch.linspace(0, 1, matrix.shape[1])
    assert_near(product(x, Stack(parts), turned=turned, kernels=None, bias=bias), (x @ matrix + bias).double(), 1e-6)
