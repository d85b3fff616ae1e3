"""The norm of a gradient does not depend on how it is split, within and between tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llamahome.distributed.reducer import sum_of_squares, total_norm

NUMBERS = 150_001


def gradients(seed: int, *, spread: float) -> np.ndarray:
    """Numbers of very different magnitudes, as in an embedding whose rows are mostly zeros."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=NUMBERS) * 10.0 ** rng.uniform(-spread, spread, NUMBERS)
    values[rng.random(NUMBERS) < 0.3] = 0.0
    return values.astype(np.float32)


def parameters_of(parts: list[np.ndarray]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(len(part))) for part in parts]
    for each, part in zip(made, parts, strict=True):
        each.grad = torch.from_numpy(part.copy())
    return made


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.floats(0, 6), st.sampled_from([1, 2, 4, 7]), st.data())
def test_every_split_has_the_same_norm(seed: int, spread: float, processes: int, data: st.DataObject) -> None:
    values = gradients(seed, spread=spread)
    expected = float(np.linalg.norm(values.astype(np.float64)))
    cuts = sorted(data.draw(st.integers(0, NUMBERS)) for _ in range(processes - 1))
    parts = np.split(values, cuts)
    squares = [sum_of_squares([torch.from_numpy(part)]) for part in parts]  # one per process, as when sharded
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(expected, rel=1e-7)
    assert float(sum_of_squares([torch.from_numpy(part) for part in parts]).sqrt()) == pytest.approx(expected, rel=1e-7)
    assert float(total_norm(parameters_of(parts))) == pytest.approx(expected, rel=1e-7)


def test_gradients_of_any_shape_layout_and_dtype_count_and_missing_ones_do_not() -> None:
    whole = torch.from_numpy(gradients(3, spread=2)[: 300 * 400]).view(300, 400)
    expected = float(whole.double().square().sum())
    for layout in (whole, whole.t(), whole[:, ::2].contiguous(), whole.double()):
        found = sum_of_squares([layout])
        assert found.dtype == torch.float64 and found.shape == ()
        assert float(found) == pytest.approx(float(layout.double().square().sum()), rel=1e-12)
    low: Tensor = whole.bfloat16()
    assert float(sum_of_squares([low, whole])) == pytest.approx(float(low.double().square().sum()) + expected, rel=1e-12)
    without = nn.Parameter(torch.zeros(3))
    assert float(total_norm([without])) == 0.0 and total_norm([without]).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_makes_the_norm_not_finite(value: float) -> None:
    values = gradients(5, spread=1)
    values[-1] = value
    assert not torch.isfinite(total_norm(parameters_of([values])))


def test_a_gradient_whose_square_overflows_float32_has_a_finite_norm() -> None:
    assert float(total_norm(parameters_of([np.full(4, 1e25, np.float32)]))) == pytest.approx(2e25, rel=1e-7)


def test_on_a_device_no_value_is_read_back() -> None:
    """The meta device has no values, so reading one raises."""
    found = sum_of_squares([torch.zeros(70_000, device="meta"), torch.zeros(3, 4, device="meta")])
    assert found.device.type == "meta" and found.dtype == torch.float64
