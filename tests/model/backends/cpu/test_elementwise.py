"""The compiled passes compute what their plain words say, forward and backward, in both types and on any number of threads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llamahome.model.backends.cpu.elementwise import (
    GATES,
    Gated,
    Norm,
    Normed,
    gated,
    norm,
    plain_gate,
    plain_norm,
    plain_rotation,
    rotated,
)
from llamahome.model.backends.cpu.native import Kernels, load_kernels

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load_kernels()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def values_of(run: Callable[[], Tensor], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    for x in inputs:
        x.grad = None
    out = run()
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def assert_same(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one.float() - other.float()).norm() <= TOLERANCE[dtype] * other.float().norm()


def some(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (37, 33), (2, 5, 64), (1, 130, 16)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_and_its_gradients_equal_the_plain_norm(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, ...], offset: float
) -> None:
    how, x, weight = Norm(1e-5, offset, None), some(*shape, dtype=dtype), some(shape[-1], dtype=dtype, seed=3)
    found = values_of(lambda: norm(x, weight, how, kernels), [x, weight])
    assert_same(found, values_of(lambda: plain_norm(x, weight, how), [x, weight]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_the_gate_and_its_gradient_equal_the_plain_gate(kernels: Kernels, dtype: torch.dtype, kind: str) -> None:
    both = some(41, 94, dtype=dtype, scale=5.0)
    assert_same(values_of(lambda: gated(both, kind, kernels), [both]), values_of(lambda: plain_gate(both, kind), [both]), dtype)


@pytest.mark.parametrize("kind", GATES)
def test_the_gate_is_exact_at_the_ends_and_hands_a_nan_on(kernels: Kernels, kind: str) -> None:
    a = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e6, float("nan")])
    both = torch.cat([a, torch.ones_like(a)])
    torch.testing.assert_close(gated(both, kind, kernels), plain_gate(both, kind), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_made_again_has_the_bits_of_the_first_time_with_and_without_a_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = some(21, 34, dtype=dtype).detach(), some(34, dtype=dtype, seed=3).detach()
    for reading, sources in ((Normed(Norm(1e-5, 1.0, None), kernels), (x, weight)), (Gated("silu", kernels), (x,))):
        out, kept = reading.read(*sources)
        wanted = [True] * len(sources)
        for grad in (None, torch.ones_like(out)):
            again, gradients = reading.back(grad, *(source.clone() for source in sources), *kept, wanted=wanted, again=True)
            assert torch.equal(again, out)
            assert [each is None for each in gradients] == [grad is None] * len(sources)
        assert reading.back(torch.ones_like(out), *sources, *kept, wanted=wanted, again=False)[0] is None


@pytest.mark.parametrize("angled", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rotation_splits_heads_and_turns_queries_and_keys(kernels: Kernels, dtype: torch.dtype, angled: torch.dtype) -> None:
    tokens, query, key, size = 19, 4, 2, 8
    columns = some(tokens, (query + 2 * key) * size, dtype=dtype)
    angles = torch.randn(tokens, size // 2, generator=torch.Generator().manual_seed(7)).repeat(1, 2)
    cosine, sine = angles.cos().to(angled), angles.sin().to(angled)

    def plain() -> Tensor:
        q, k, v = (x.view(tokens, -1, size) for x in columns.split([query * size, key * size, key * size], 1))
        return torch.cat([plain_rotation(q, cosine, sine), plain_rotation(k, cosine, sine), v], 1)

    def ours() -> Tensor:
        return torch.cat(rotated(columns, cosine, sine, heads=(query, key), kernels=kernels), 1)

    assert_same(values_of(ours, [columns]), values_of(plain, [columns]), dtype)


def test_the_bits_do_not_depend_on_the_number_of_threads(kernels: Kernels) -> None:
    x, weight, how, results = some(67, 48, dtype=torch.float32), some(48, dtype=torch.float32), Norm(1e-5, 0.0, None), []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append([*values_of(lambda: norm(x, weight, how, kernels), [x, weight]), *values_of(lambda: gated(x, "silu", kernels), [x])])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
