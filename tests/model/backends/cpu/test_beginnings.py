"""Documents that begin alike cost less and teach the same, to every weight of every kind of model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import KINDS, examples_of, microbatch_of, objective_of, our_model, plain_loss, plain_model, save_tiny

from llamahome.data.records import Example
from llamahome.model.backends.backend import Scoring
from llamahome.model.backends.cpu.beginnings import draws_lots, lay_once
from llamahome.model.backends.cpu.blocks import block_attention
from llamahome.model.backends.documents import Documents
from llamahome.model.backends.reference import reference_attention

CPU = torch.device("cpu")
SHARING = [kind for kind in KINDS if kind != "gemma2"]
"""gemma2 caps its scores, which the reference does, which keeps every token at its place."""


def alike(lengths: list[int], shared: int) -> list[Example]:
    """Documents of these lengths with `shared` equal first tokens, of which targets too, each for itself."""
    examples = examples_of(lengths, target_share=0.7)
    first = examples[int(np.argmax(lengths))].tokens[:shared]
    return [replace(each, tokens=np.concatenate([first, each.tokens[shared:]])) for each in examples]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in SHARING}


@pytest.mark.parametrize("kind", SHARING)
def test_loss_and_gradients_equal_each_document_alone(folders: dict[str, Path], kind: str) -> None:
    ours, plain, examples = our_model(folders[kind]), plain_model(kind), alike([40, 31, 30, 12, 11, 9], 8)
    assert not draws_lots(ours)
    batch = microbatch_of(examples)
    assert lay_once(batch.tokens_T, batch.positions_T, batch.rows_N, batch.lengths).shared >= 8
    loss, expected = objective_of(ours).loss_sum(batch), sum(plain_loss(plain, example) for example in examples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:  # an expert that no token reached
            assert parameter.grad is None
            continue
        assert (parameter.grad - theirs[name].grad).norm() <= 1e-5 * (theirs[name].grad.norm() + 1e-6), name


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 300), min_size=2, max_size=6), st.integers(1, 200), st.none() | st.integers(1, 150))
def test_attention_over_shared_tokens_equals_attention_over_copies(lengths: list[int], shared: int, window: int | None) -> None:
    lengths, random = sorted(lengths, reverse=True), torch.Generator().manual_seed(sum(lengths))
    shared = min(shared, lengths[-1] - 1)
    laid = torch.cat(
        [torch.cat([torch.arange(shared), torch.arange(length - shared) + 1000 * (n + 1)]) for n, length in enumerate(lengths)]
    )
    names, place = torch.unique(laid, return_inverse=True)  # in this order they lie in the pass
    once = [torch.randn(len(names), heads, 8, generator=random).requires_grad_() for heads in (4, 2, 2)]
    found = block_attention(*once, Documents(tuple(lengths), shared), scale=0.4, window=window)[place]
    copies = (x[place] for x in once)
    expected = reference_attention(*copies, Documents(tuple(lengths)), Scoring(0.4, window))
    incoming = torch.randn(expected.shape, generator=random)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, once, incoming), torch.autograd.grad(expected, once, incoming), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.integers(0, 12))
def test_every_token_keeps_its_position_and_every_target_what_stands_before_it(lengths: list[int], shared: int) -> None:
    batch = microbatch_of(alike(lengths, min(shared, min(lengths))))
    laid = lay_once(batch.tokens_T, batch.positions_T, batch.rows_N, batch.lengths)
    assert len(laid.tokens_C) == len(batch.tokens_T) - laid.shared * (len(lengths) - 1)
    assert torch.equal(laid.tokens_C[laid.rows_N], batch.tokens_T[batch.rows_N])
    assert torch.equal(laid.positions_C[laid.rows_N], batch.positions_T[batch.rows_N])
    parts = laid.tokens_C[laid.shared :].split([length - laid.shared for length in batch.lengths])
    whole = torch.cat([torch.cat([laid.tokens_C[: laid.shared], part]) for part in parts])
    assert torch.equal(whole, batch.tokens_T)


def test_nothing_is_shared_where_chance_decides(folders: dict[str, Path]) -> None:
    ours = our_model(folders["llama"]).train()
    assert not draws_lots(ours)
    ours.get_decoder().layers[0].mlp.dropout = torch.nn.Dropout(0.1)
    assert draws_lots(ours) and not draws_lots(ours.eval())
    ours = our_model(folders["llama"]).train()
    ours.config.attention_dropout = 0.1
    assert draws_lots(ours)
