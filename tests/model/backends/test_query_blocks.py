"""Attention of long passes, in blocks whose probabilities are not kept, has the values and gradients of one masked product."""

import pytest
import torch
from torch import Tensor

from llamahome.model.backends.backend import Documents, Scoring
from llamahome.model.backends.cpu import blocks
from llamahome.model.backends.cpu.blocks import block_attention
from llamahome.model.backends.query_blocks import attend_in_blocks
from llamahome.model.backends.reference import reference_attention

LENGTHS = (131, 40, 7, 1)


def inputs() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, 16, generator=random).requires_grad_() for heads in (4, 2, 2)]


def gradients(out: Tensor, *of: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), of)]


@pytest.mark.parametrize("scores", [1, 4 * 179 * 37, 10**9])
@pytest.mark.parametrize("scoring", [Scoring(0.3), Scoring(0.3, window=9), Scoring(0.3, softcap=2.0)], ids=["all", "window", "capped"])
def test_blocks_equal_the_whole_product(scoring: Scoring, scores: int) -> None:
    q, k, v = inputs()
    expected = gradients(reference_attention(q, k, v, Documents(LENGTHS), scoring), q, k, v)
    found = gradients(attend_in_blocks(q, k, v, Documents(LENGTHS), scoring, most_scores=scores), q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_probabilities_that_are_computed_again_are_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    expected = gradients(block_attention(q, k, v, Documents(LENGTHS), scale=0.3, window=window), q, k, v)
    monkeypatch.setattr(blocks, "LONGEST_KEPT", 40)
    found = gradients(block_attention(q, k, v, Documents(LENGTHS), scale=0.3, window=window), q, k, v)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_dropout_takes_the_same_numbers_in_the_backward_pass() -> None:
    q, k, v = inputs()
    scoring = Scoring(0.3, dropout=0.5)
    torch.manual_seed(4)
    out = attend_in_blocks(q, k, v, Documents(LENGTHS), scoring, most_scores=1)
    torch.manual_seed(5)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    moved = v.detach() + 1.0
    torch.manual_seed(4)
    change = (attend_in_blocks(q, k, moved, Documents(LENGTHS), scoring, most_scores=1) - out).sum()
    torch.testing.assert_close(gradient.sum(), change, rtol=1e-4, atol=1e-2)
