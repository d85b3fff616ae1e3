"""The kernels equal their plain definitions, forward and backward, in both dtypes and for any number of threads."""

from collections.abc import Callable

import pytest
import torch
from tests.support.levels import kernels_or_skip
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import ACT2FN, LlamaRMSNorm, apply_rotary_pos_emb

from llamahome.model.backends.cpu.elementwise import (
    GATES,
    GatedActivation,
    NormOptions,
    RmsNorm,
    Transform,
    plain_gate,
    plain_norm,
    rms_norm,
    rotate_heads,
)
from llamahome.model.backends.cpu.native import Kernels

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return kernels_or_skip()


def value_and_gradients(run: Callable[[], Tensor], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    for x in inputs:
        x.grad = None
    out = run()
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def plain_rotation(x_THE: Tensor, cosine_TE: Tensor, sine_TE: Tensor) -> Tensor:
    """Rotates the pairs (i, i + E/2) by the angles of their token."""
    a, b = x_THE.float().chunk(2, -1)
    rotated = x_THE.float() * cosine_TE[:, None].float() + torch.cat([-b, a], -1) * sine_TE[:, None].float()
    return rotated.to(x_THE.dtype)


def gated_activation(gate_up: Tensor, kind: str, kernels: Kernels) -> Tensor:
    return Transform.apply(GatedActivation(kind, kernels), gate_up)


def assert_same(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one.float() - other.float()).norm() <= TOLERANCE[dtype] * other.float().norm()


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).requires_grad_()


def test_the_plain_definitions_are_those_of_transformers() -> None:
    x, weight = random(5, 32, dtype=torch.float32).detach(), random(32, dtype=torch.float32, seed=3).detach()
    for norm, offset in ((LlamaRMSNorm(32, eps=1e-5), 0.0), (GemmaRMSNorm(32, eps=1e-5), 1.0)):
        norm.weight.data = weight
        torch.testing.assert_close(plain_norm(x, weight, NormOptions(1e-5, offset, None)), norm(x).detach())
    for kind, name in zip(GATES, ("silu", "gelu_pytorch_tanh"), strict=True):
        torch.testing.assert_close(plain_gate(x, kind), ACT2FN[name](x[:, :16]) * x[:, 16:])
    angles = torch.randn(5, 4, generator=torch.Generator().manual_seed(7)).repeat(1, 2)
    heads = x.view(5, 4, 8)
    expected, _ = apply_rotary_pos_emb(heads[None], heads[None], angles.cos()[None], angles.sin()[None], unsqueeze_dim=2)
    torch.testing.assert_close(plain_rotation(heads, angles.cos(), angles.sin()), expected[0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (37, 33), (2, 5, 64), (1, 130, 16)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_and_its_gradients_equal_the_plain_norm(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, ...], offset: float
) -> None:
    options, x, weight = NormOptions(1e-5, offset, None), random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=3)
    found = value_and_gradients(lambda: rms_norm(x, weight, options, kernels), [x, weight])
    assert_same(found, value_and_gradients(lambda: plain_norm(x, weight, options), [x, weight]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_the_gate_and_its_gradient_equal_the_plain_gate(kernels: Kernels, dtype: torch.dtype, kind: str) -> None:
    gate_up = random(41, 94, dtype=dtype, scale=5.0)
    found = value_and_gradients(lambda: gated_activation(gate_up, kind, kernels), [gate_up])
    assert_same(found, value_and_gradients(lambda: plain_gate(gate_up, kind), [gate_up]), dtype)


@pytest.mark.parametrize("kind", GATES)
def test_the_gate_is_exact_for_extreme_values_and_propagates_nan(kernels: Kernels, kind: str) -> None:
    gate = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e6, float("nan")])
    gate_up = torch.cat([gate, torch.ones_like(gate)])
    found = gated_activation(gate_up, kind, kernels)
    torch.testing.assert_close(found, plain_gate(gate_up, kind), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_recomputed_inputs_have_the_same_bits_with_and_without_a_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = random(21, 34, dtype=dtype).detach(), random(34, dtype=dtype, seed=3).detach()
    norm = RmsNorm(NormOptions(1e-5, 1.0, None), kernels)
    for transform, sources in ((norm, (x, weight)), (GatedActivation("silu", kernels), (x,))):
        out, kept = transform.forward(*sources)
        needs_grad = [True] * len(sources)
        for grad in (None, torch.ones_like(out)):
            copies = [source.clone() for source in sources]
            recomputed, gradients = transform.backward(grad, *copies, *kept, needs_grad=needs_grad, recompute=True)
            assert torch.equal(recomputed, out)
            assert [gradient is None for gradient in gradients] == [grad is None] * len(sources)
        assert transform.backward(torch.ones_like(out), *sources, *kept, needs_grad=needs_grad, recompute=False)[0] is None


@pytest.mark.parametrize("angle_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rotation_splits_heads_and_rotates_queries_and_keys(kernels: Kernels, dtype: torch.dtype, angle_dtype: torch.dtype) -> None:
    tokens, queries, keys, size = 19, 4, 2, 8
    qkv = random(tokens, (queries + 2 * keys) * size, dtype=dtype)
    angles = torch.randn(tokens, size // 2, generator=torch.Generator().manual_seed(7)).repeat(1, 2)
    cosine, sine = angles.cos().to(angle_dtype), angles.sin().to(angle_dtype)

    def plain() -> Tensor:
        q, k, v = (x.view(tokens, -1, size) for x in qkv.split([queries * size, keys * size, keys * size], 1))
        return torch.cat([plain_rotation(q, cosine, sine), plain_rotation(k, cosine, sine), v], 1)

    def ours() -> Tensor:
        return torch.cat(rotate_heads(qkv, cosine, sine, heads=(queries, keys), kernels=kernels), 1)

    assert_same(value_and_gradients(ours, [qkv]), value_and_gradients(plain, [qkv]), dtype)


def test_the_number_of_threads_changes_no_bit(kernels: Kernels) -> None:
    x, weight, options = random(67, 48, dtype=torch.float32), random(48, dtype=torch.float32), NormOptions(1e-5, 0.0, None)
    results, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        norm = value_and_gradients(lambda: rms_norm(x, weight, options, kernels), [x, weight])
        results.append([*norm, *value_and_gradients(lambda: gated_activation(x, "silu", kernels), [x])])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
