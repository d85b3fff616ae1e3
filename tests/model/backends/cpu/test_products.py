"""The product kernels equal exact products for any sizes, stacks and ranks, and read nothing outside of their operands."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.levels import CASES, kernels_at
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.products import Stack, adapted_product, can_multiply, outer_product, product

EVEN = st.integers(1, 90).map(lambda half: 2 * half)


@dataclass(frozen=True)
class Products:
    """The product kernels at one level in one dtype."""

    kernels: Kernels
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """Relative tolerance: sums are exact to 1e-6, and bfloat16 results are tolerance to 8 bits."""
        return 1e-6 if self.dtype == torch.float32 else 4e-3

    def random(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


@pytest.fixture(scope="module", params=CASES)
def ours(request: pytest.FixtureRequest) -> Products:
    level, dtype = request.param
    return Products(kernels_at(level, "product", dtype), dtype)


def surrounded_by_nan(x: Tensor) -> Tensor:
    """The same numbers surrounded by NaN, which reach the result if a kernel reads too far."""
    whole = torch.full((x.shape[0] + 2, x.shape[1] + 4), math.nan, dtype=x.dtype)
    whole[1:-1, 2:-2] = x
    return whole[1:-1, 2:-2]


def assert_near(found: Tensor, exact: Tensor, limit: float, *, summed: int = 1) -> None:
    """The tolerance is relative to the expected norm of sums of `summed` normal numbers, because a few results may be small by chance."""
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
def test_products_with_a_stack_and_its_transpose_equal_exact_ones(
    ours: Products, tokens: int, heights: list[int], width: int, rank: int, seed: int
) -> None:
    heights[0] += sum(heights) % 2
    parts = [ours.random(rows, width, seed=seed + index) for index, rows in enumerate(heights)]
    assert can_multiply(ours.kernels, parts)
    whole, stack = torch.cat(parts).double(), Stack(parts)
    for transposed in (True, False):
        matrix = whole.t() if transposed else whole
        x, bias = surrounded_by_nan(ours.random(tokens, matrix.shape[0], seed=seed + 7)), torch.linspace(-1, 1, matrix.shape[1])
        exact, summed = x.double() @ matrix + bias.double(), matrix.shape[0]
        assert_near(product(x, stack, transposed=transposed, kernels=ours.kernels, bias=bias), exact, ours.tolerance, summed=summed)
        first, second = ours.random(2 * rank, matrix.shape[0], seed=seed + 8), ours.random(2 * rank, matrix.shape[1], seed=seed + 9)
        low, out = adapted_product(x, stack, first, second, transposed=transposed, kernels=ours.kernels, bias=bias)
        assert_near(low, x.double() @ first.double().t(), ours.tolerance, summed=summed)
        assert_near(out, exact + low.double() @ second.double(), ours.tolerance, summed=summed)


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 70), rows=st.integers(1, 130), columns=st.integers(1, 130), seed=st.integers(0, 99))
def test_outer_products_equal_exact_ones(ours: Products, tokens: int, rows: int, columns: int, seed: int) -> None:
    left, right = surrounded_by_nan(ours.random(tokens, rows, seed=seed)), surrounded_by_nan(ours.random(tokens, columns, seed=seed + 1))
    exact = left.double().t() @ right.double()
    found = outer_product(left, right, kernels=ours.kernels)
    assert_near(found, exact, 1e-6, summed=tokens)
    assert outer_product(left, right, kernels=ours.kernels, out=found) is found
    assert_near(found, 2 * exact, 1e-6, summed=4 * tokens)


@pytest.mark.parametrize(("tokens", "rows", "width"), [(2100, 100, 3300), (5, 3300, 100), (33, 6400, 48), (4500, 50, 1700)])
def test_sums_beyond_the_cache_and_rows_beyond_a_slab_are_exact(ours: Products, tokens: int, rows: int, width: int) -> None:
    stack, matrix = Stack([ours.random(rows, width, seed=1)]), ours.random(rows, width, seed=1).double()
    x, y = ours.random(tokens, width, seed=2), ours.random(tokens, rows, seed=3)
    first, second = ours.random(16, rows, seed=4), ours.random(16, width, seed=5)
    assert_near(product(x, stack, transposed=True, kernels=ours.kernels), x.double() @ matrix.t(), ours.tolerance)
    low, out = adapted_product(y, stack, first, second, transposed=False, kernels=ours.kernels)
    assert_near(low, y.double() @ first.double().t(), ours.tolerance)
    assert_near(out, y.double() @ matrix + low.double() @ second.double(), ours.tolerance)
    assert_near(outer_product(y, x, kernels=ours.kernels), y.double().t() @ x.double(), 2e-6)


def test_the_number_of_threads_changes_no_bit(ours: Products) -> None:
    stack, x = Stack([ours.random(1000, 1600, seed=1), ours.random(34, 1600, seed=2)]), ours.random(403, 1600, seed=3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            forward = product(x, stack, transposed=True, kernels=ours.kernels)
            results.append(
                (forward, product(forward, stack, transposed=False, kernels=ours.kernels), outer_product(forward, x, kernels=ours.kernels))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_nan_and_inf_stay_in_their_rows(ours: Products) -> None:
    x, stack = ours.random(20, 64, seed=1), Stack([ours.random(50, 64, seed=2)])
    x[3, 5], x[11, 0] = math.nan, math.inf
    out = product(x, stack, transposed=True, kernels=ours.kernels)
    assert out[3].isnan().all() and not out[11].isfinite().any()
    assert out[[row for row in range(20) if row not in (3, 11)]].isfinite().all()


def test_unsupported_operands_are_recognized(ours: Products) -> None:
    fine, single = ours.random(6, 8, seed=0), ours.dtype == torch.float32
    assert can_multiply(ours.kernels, [fine]) and not can_multiply(None, [fine])
    assert not can_multiply(ours.kernels, [fine.double()]) and not can_multiply(ours.kernels, [fine, fine.double()])
    assert can_multiply(ours.kernels, [ours.random(6, 7, seed=0)]) == can_multiply(ours.kernels, [ours.random(5, 8, seed=0)]) == single
    assert not can_multiply(ours.kernels, [fine.t()])


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    heights=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    width=st.integers(1, 70),
    rank=st.integers(1, 9),
)
def test_float32_supports_odd_sizes(ours: Products, tokens: int, heights: list[int], width: int, rank: int) -> None:
    if ours.dtype != torch.float32:
        pytest.skip("bfloat16 requires even sizes")
    parts = [ours.random(rows, width, seed=index) for index, rows in enumerate(heights)]
    whole, stack = torch.cat(parts).double(), Stack(parts)
    for transposed in (True, False):
        matrix = whole.t() if transposed else whole
        x = surrounded_by_nan(ours.random(tokens, matrix.shape[0], seed=7))
        first, second = ours.random(rank, matrix.shape[0], seed=8), ours.random(rank, matrix.shape[1], seed=9)
        low, out = adapted_product(x, stack, first, second, transposed=transposed, kernels=ours.kernels)
        assert_near(out, x.double() @ matrix + low.double() @ second.double(), ours.tolerance)


@pytest.mark.parametrize("transposed", [True, False])
def test_without_kernels_a_stack_of_several_matrices_gives_the_same(transposed: bool) -> None:
    parts = [torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows)) for rows in (5, 8)]
    matrix = torch.cat(parts).t() if transposed else torch.cat(parts)
    x, bias = torch.linspace(-1, 1, 3 * matrix.shape[0]).view(3, -1), torch.linspace(0, 1, matrix.shape[1])
    assert_near(product(x, Stack(parts), transposed=transposed, kernels=None, bias=bias), (x @ matrix + bias).double(), 1e-6)
