"""Distillation and the policy gradient equal autograd over whole logits in float64, in value and gradients, however they are tiled."""

import pytest
import torch
import torch.nn.functional as F
from tests.model.backends.test_loss import FORMS, inputs
from torch import Tensor

from llamahome.model.backends.loss import Head
from llamahome.model.backends.token_losses import (
    Distillation,
    PolicyGradient,
    TopTokens,
    label_log_probabilities,
    summed_token_loss,
    top_tokens,
)

ROWS, VOCABULARY = 23, 120
TILES = (16 * VOCABULARY, 1 << 20)
"""Several tiles, and one."""


def final_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = F.linear(hidden.double(), head.weight_VD.double(), None if head.bias_V is None else head.bias_V.double()) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def assert_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(loss / 7, leaves) for loss in (ours, theirs))
    for mine, plain in zip(found, expected, strict=True):
        assert (mine - plain).norm() <= 1e-5 * plain.norm() + 1e-7


def teacher_of(vocabulary: int, count: int) -> tuple[TopTokens, Tensor]:
    """What is stored of a teacher, and all of its probabilities."""
    hidden, _, weight, bias = inputs(ROWS, vocabulary, seed=5)
    head = Head(weight.detach(), bias.detach())
    return top_tokens(hidden.detach(), head, count, dtype=torch.float32, logits=TILES[0]), final_logits(hidden, head).softmax(-1).detach()


def plain_distillation(logits: Tensor, labels: Tensor, teacher_all: Tensor, count: int, *, weight: float, temperature: float) -> Tensor:
    """By the book: the K likeliest tokens and one outcome for all others, both softened, and torch's own divergence."""
    own = logits.softmax(-1)
    chosen = torch.zeros_like(teacher_all, dtype=torch.bool).scatter(1, teacher_all.topk(count).indices, True)

    def outcomes(shares: Tensor) -> Tensor:
        parts = shares[chosen].view(len(shares), count)
        if count < shares.shape[1]:
            parts = torch.cat([parts, shares.masked_fill(chosen, 0.0).sum(-1, keepdim=True)], -1)
        soft = parts ** (1 / temperature)
        return soft / soft.sum(-1, keepdim=True)

    divergence = F.kl_div(outcomes(own).log(), outcomes(teacher_all), reduction="sum") * temperature**2
    return weight * divergence + (1 - weight) * F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "weight", "temperature"), [(1, 0.5, 1.0), (8, 1.0, 1.0), (8, 0.3, 2.0), (VOCABULARY, 0.7, 0.5)])
@pytest.mark.parametrize("tile", TILES)
def test_distillation_equals_whole_logits(form: str, count: int, weight: float, temperature: float, tile: int) -> None:
    hidden, labels, matrix, bias = inputs(ROWS, VOCABULARY)
    head = Head(matrix, bias, **FORMS[form])
    teacher, teacher_all = teacher_of(VOCABULARY, count)
    ours = summed_token_loss(hidden, head, Distillation(labels, teacher, weight, temperature), dtype=torch.float32, logits=tile)
    theirs = plain_distillation(final_logits(hidden, head), labels, teacher_all, count, weight=weight, temperature=temperature)
    assert_equal(ours, theirs, [hidden, matrix, bias])


def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient() -> None:
    hidden, labels, matrix, bias = inputs(ROWS, VOCABULARY)
    head = Head(matrix, bias)
    teacher = top_tokens(hidden, head, 8, dtype=torch.float32)
    loss = summed_token_loss(hidden, head, Distillation(labels, teacher, 1.0, 2.0), dtype=torch.float32)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert abs(float(loss.detach())) < 1e-4 and float(grad.abs().max()) < 1e-5


def plain_policy(
    logits: Tensor, labels: Tensor, advantages: Tensor, reference: Tensor | None, *, beta: float, temperature: float
) -> Tensor:
    own = (logits / temperature).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    loss = -advantages * torch.exp(own - own.detach())
    if reference is not None:
        loss = loss + beta * (torch.exp(reference - own) - (reference - own) - 1)
    return loss.sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("tile", TILES)
def test_the_policy_gradient_equals_whole_logits(form: str, beta: float, temperature: float, tile: int) -> None:
    hidden, labels, matrix, bias = inputs(ROWS, VOCABULARY)
    head, random = Head(matrix, bias, **FORMS[form]), torch.Generator().manual_seed(3)
    advantages = torch.randn(ROWS, generator=random)
    other = hidden.detach() + 0.3 * torch.randn(hidden.shape, generator=random)
    reference = label_log_probabilities(other, labels, head, dtype=torch.float32, temperature=temperature, logits=tile) if beta else None
    sums = torch.zeros(2)
    policy = PolicyGradient(labels, advantages, temperature, reference, beta, sums)
    ours = summed_token_loss(hidden, head, policy, dtype=torch.float32, logits=tile)
    plain_reference = None
    if beta:
        plain_reference = (final_logits(other, head) / temperature).log_softmax(-1).gather(1, labels[:, None]).squeeze(1).detach()
    logits = final_logits(hidden, head)
    theirs = plain_policy(logits, labels, advantages, plain_reference, beta=beta, temperature=temperature)
    assert_equal(ours, theirs, [hidden, matrix, bias])
    own = (logits / temperature).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(sums[1].double(), -own.sum(), rtol=1e-5, atol=1e-5)
    if plain_reference is not None:
        away = plain_reference - own
        torch.testing.assert_close(sums[0].double(), (away.exp() - away - 1).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [5, VOCABULARY, VOCABULARY + 9])
def test_the_stored_tokens_and_the_rest_are_all_of_the_teacher(count: int) -> None:
    found, shares = teacher_of(VOCABULARY, count)
    assert found.ids_NK.shape == (ROWS, min(count, VOCABULARY))
    torch.testing.assert_close(found.logs_NK.double().exp(), shares.gather(1, found.ids_NK), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.logs_NK.exp().sum(-1) + found.rest_N.exp(), torch.ones(ROWS), rtol=1e-5, atol=1e-5)


def test_no_target_is_no_loss() -> None:
    hidden, labels, matrix, bias = inputs(0, VOCABULARY)
    nothing = TopTokens(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0))
    loss = summed_token_loss(hidden, Head(matrix, bias), Distillation(labels, nothing, 0.5, 1.0), dtype=torch.float32)
    loss.backward()
    assert float(loss.detach()) == 0.0
