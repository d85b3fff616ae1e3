"""The loss head equals cross entropy of full logits, in value and gradients, without ever holding them."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.levels import kernels_or_skip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamahome.model.backends.cpu.head import CompiledTiles
from llamahome.model.backends.cuda.head import PlainDeviceTiles
from llamahome.model.backends.loss import Head, MakeTiles, PlainTiles, head_stats, summed_cross_entropy, tile_rows

FORMS = {"plain": {}, "scaled": {"scale": 0.25}, "capped": {"softcap": 2.0}, "both": {"scale": 1.7, "softcap": 3.0}}
LARGE_VOCABULARY = 49_152


def inputs(rows: int, vocabulary: int, *, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, labels, weight and bias; logits with a standard deviation near 3."""
    random = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=random) for shape in ((rows, size), (vocabulary, size), (vocabulary,)))
    return hidden.requires_grad_(), torch.randint(vocabulary, (rows,), generator=random), weight.requires_grad_(), bias.requires_grad_()


def full_loss(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    logits = F.linear(hidden, head.weight_VD, head.bias_V) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


def assert_equals_full_logits(rows: int, vocabulary: int, form: dict[str, float], *, seed: int = 0, biased: bool = True) -> None:
    hidden, labels, weight, bias = inputs(rows, vocabulary, seed=seed)
    head = Head(weight, bias if biased else None, **form)
    inputs_with_grad = [hidden, weight, bias] if biased else [hidden, weight]
    ours, theirs = summed_cross_entropy(hidden, labels, head, dtype=torch.float32), full_loss(hidden, labels, head)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # The step divides by the number of targets, so the incoming gradient is not 1.
    for found, expected in zip(
        torch.autograd.grad(ours / 7, inputs_with_grad), torch.autograd.grad(theirs / 7, inputs_with_grad), strict=True
    ):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 70), st.integers(2, 300), st.sampled_from(sorted(FORMS)), st.booleans(), st.integers(0, 99))
def test_the_loss_equals_cross_entropy_of_full_logits(rows: int, vocabulary: int, form: str, biased: bool, seed: int) -> None:
    assert_equals_full_logits(rows, vocabulary, FORMS[form], seed=seed, biased=biased)


@pytest.mark.parametrize("form", FORMS)
def test_several_tiles_equal_full_logits(form: str) -> None:
    assert tile_rows(2 * 128 + 3, LARGE_VOCABULARY, 128 * LARGE_VOCABULARY) == 87  # three equal tiles
    assert_equals_full_logits(2 * 128 + 3, LARGE_VOCABULARY, FORMS[form], biased=form != "plain")


@pytest.mark.parametrize("rows", [127, 128, 129, 256])
def test_row_counts_around_the_size_of_a_tile_are_exact(rows: int) -> None:
    assert_equals_full_logits(rows, LARGE_VOCABULARY, {})


def test_a_tied_weight_gets_the_gradients_of_both_uses() -> None:
    _, labels, weight, _ = inputs(40, 100)
    tokens = labels.roll(1)
    ours = summed_cross_entropy(F.embedding(tokens, weight), labels, Head(weight, None), dtype=torch.float32)
    theirs = full_loss(F.embedding(tokens, weight), labels, Head(weight, None))
    found, expected = (torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, labels, weight, bias = inputs(40, 100)
    frozen = Head(weight.detach(), bias.detach())
    summed_cross_entropy(hidden, labels, frozen, dtype=torch.float32).backward()
    expected = torch.autograd.grad(full_loss(hidden, labels, frozen), hidden)[0]
    assert frozen.weight_VD.grad is None and (hidden.grad - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_products_are_exact_but_for_one_rounding_each(form: str) -> None:
    """Inputs are exact in bfloat16, and logits are rounded once to 2^-9 of their value (up to 0.03 here). The gradient of a row is a vector
    of probabilities: it changes by as much, and is rounded twice more. The factor 1/7 is not rounded, which would shift all gradients."""
    hidden, labels, weight, bias = (x.detach().bfloat16() if x.is_floating_point() else x for x in inputs(300, 1000))
    low = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.float().requires_grad_() for x in (hidden, weight, bias)]
    ours = summed_cross_entropy(low[0], labels, Head(low[1], low[2], **FORMS[form]), dtype=torch.bfloat16)
    theirs = full_loss(exact[0], labels, Head(exact[1], exact[2], **FORMS[form]))
    assert ours.dtype == torch.float32 and abs(ours - theirs) < 2**-9 * theirs
    for found, expected in zip(torch.autograd.grad(ours / 7, low), torch.autograd.grad(theirs / 7, exact), strict=True):
        assert found.dtype == torch.bfloat16 and (found.float() - expected).norm() < 8 * 2**-9 * expected.norm()
        scale = (found.double() * expected.double()).sum() / expected.double().square().sum()
        assert abs(scale - 1) < 2**-10, "all gradients are scaled by the same error"


def test_float32_weights_under_bfloat16_products_get_float32_gradients() -> None:
    hidden, labels, weight, bias = inputs(50, 200)
    found = torch.autograd.grad(summed_cross_entropy(hidden, labels, Head(weight, bias), dtype=torch.bfloat16), [hidden, weight, bias])
    expected = torch.autograd.grad(full_loss(hidden, labels, Head(weight, bias)), [hidden, weight, bias])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 16 * 2**-9 * theirs.norm()


def test_a_second_backward_pass_is_refused() -> None:
    hidden, labels, weight, _ = inputs(5, 20)
    loss = summed_cross_entropy(hidden, labels, Head(weight, None), dtype=torch.float32)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_full_logits_are_never_held() -> None:
    hidden, labels, weight, _ = inputs(1024, LARGE_VOCABULARY, size=2)
    frozen = Head(weight.detach(), None)
    with LargestTensor() as largest:
        summed_cross_entropy(hidden, labels, frozen, dtype=torch.bfloat16).backward()
        head_stats(hidden, labels, frozen, dtype=torch.bfloat16)
    assert largest.elements == 128 * LARGE_VOCABULARY


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 70), st.integers(2, 300), st.sampled_from(sorted(FORMS)))
def test_statistics_equal_full_logits(rows: int, vocabulary: int, form: str) -> None:
    hidden, labels, weight, bias = inputs(rows, vocabulary)
    head = Head(weight, bias, **FORMS[form])
    found = head_stats(hidden, labels, head, dtype=torch.float32)
    torch.testing.assert_close(found.loss_sum, full_loss(hidden, labels, head).detach(), rtol=1e-5, atol=1e-5)
    assert int(found.correct) == int((F.linear(hidden, weight, bias).argmax(-1) == labels).sum())


TILES: dict[str, Callable[[], MakeTiles]] = {
    "plain": lambda: PlainTiles,
    "device": lambda: PlainDeviceTiles,
    "kernels": lambda: functools.partial(CompiledTiles, kernels=kernels_or_skip()),
}
"""Implementations of the tiles; those of kernels skip the test if there are none."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", TILES)
def test_every_implementation_of_tiles_gives_the_same_loss_and_gradients(name: str, dtype: torch.dtype, trained: bool) -> None:
    random = torch.Generator().manual_seed(4)
    labels, results = torch.randint(0, 301, (37,), generator=random), []
    hidden_values, weight_values = torch.randn(37, 16, generator=random), torch.randn(301, 16, generator=random)
    for tiles in (TILES[name](), PlainTiles):
        hidden, weight = hidden_values.to(dtype).requires_grad_(), weight_values.to(dtype).requires_grad_(trained)
        bias = torch.linspace(-1, 1, 301).to(dtype).requires_grad_(trained)
        loss = summed_cross_entropy(hidden, labels, Head(weight, bias), dtype=dtype, tiles=tiles)
        loss.backward()
        results.append([loss.detach(), hidden.grad, *([weight.grad, bias.grad] if trained else [])])
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert (found.float() - expected.float()).norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("name", TILES)
def test_every_implementation_of_tiles_propagates_nan(name: str) -> None:
    hidden = torch.ones(3, 4)
    hidden[1, 2] = float("nan")
    head = Head(torch.ones(5, 4), None)
    assert summed_cross_entropy(hidden, torch.tensor([0, 1, 2]), head, dtype=torch.float32, tiles=TILES[name]()).isnan()
