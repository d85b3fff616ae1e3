"""Computing a shared prefix once gives the same loss and gradients, for every weight of every kind of model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import KINDS, examples_of, microbatch_of, objective_of, our_model, plain_loss, plain_model, save_tiny

from llamahome.data.records import Example
from llamahome.model.backends.backend import Documents, Scoring
from llamahome.model.backends.cpu.blocks import block_attention
from llamahome.model.backends.cpu.shared_prefix import share_prefix
from llamahome.model.backends.groups import uses_dropout
from llamahome.model.backends.reference import reference_attention

CPU = torch.device("cpu")
SHARING = [kind for kind in KINDS if kind != "gemma2"]
"""gemma2 caps its scores, so it attends as the reference does, which does not share prefixes."""


def examples_with_prefix(lengths: list[int], shared: int) -> list[Example]:
    """Documents of these lengths with `shared` equal first tokens; some of these are targets, different ones in each document."""
    examples = examples_of(lengths, target_share=0.7)
    first = examples[int(np.argmax(lengths))].tokens[:shared]
    return [replace(each, tokens=np.concatenate([first, each.tokens[shared:]])) for each in examples]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in SHARING}


@pytest.mark.parametrize("kind", SHARING)
def test_loss_and_gradients_equal_each_document_alone(folders: dict[str, Path], kind: str) -> None:
    ours, plain, examples = our_model(folders[kind]), plain_model(kind), examples_with_prefix([40, 31, 30, 12, 11, 9], 8)
    assert not uses_dropout(ours)
    batch = microbatch_of(examples)
    assert share_prefix(batch.tokens_T, batch.positions_T, batch.rows_N, batch.lengths).shared >= 8
    loss, expected = objective_of(ours).loss_sum(batch), sum(plain_loss(plain, example) for example in examples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:  # an expert without tokens
            assert parameter.grad is None
            continue
        assert (parameter.grad - theirs[name].grad).norm() <= 1e-5 * (theirs[name].grad.norm() + 1e-6), name


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 300), min_size=2, max_size=6), st.integers(1, 200), st.none() | st.integers(1, 150))
def test_attention_over_shared_tokens_equals_attention_over_copies(lengths: list[int], shared: int, window: int | None) -> None:
    lengths, random = sorted(lengths, reverse=True), torch.Generator().manual_seed(sum(lengths))
    shared = min(shared, lengths[-1] - 1)
    tokens = torch.cat(
        [torch.cat([torch.arange(shared), torch.arange(length - shared) + 1000 * (n + 1)]) for n, length in enumerate(lengths)]
    )
    unique, index = torch.unique(tokens, return_inverse=True)  # in the order of the pass
    once = [torch.randn(len(unique), heads, 8, generator=random).requires_grad_() for heads in (4, 2, 2)]
    found = block_attention(*once, Documents(tuple(lengths), shared), scale=0.4, window=window)[index]
    copies = (x[index] for x in once)
    expected = reference_attention(*copies, Documents(tuple(lengths)), Scoring(0.4, window))
    incoming = torch.randn(expected.shape, generator=random)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, once, incoming), torch.autograd.grad(expected, once, incoming), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.integers(0, 12))
def test_every_token_keeps_its_position_and_every_target_its_predecessor(lengths: list[int], shared: int) -> None:
    batch = microbatch_of(examples_with_prefix(lengths, min(shared, min(lengths))))
    prefixed = share_prefix(batch.tokens_T, batch.positions_T, batch.rows_N, batch.lengths)
    assert len(prefixed.tokens_C) == len(batch.tokens_T) - prefixed.shared * (len(lengths) - 1)
    assert torch.equal(prefixed.tokens_C[prefixed.rows_N], batch.tokens_T[batch.rows_N])
    assert torch.equal(prefixed.positions_C[prefixed.rows_N], batch.positions_T[batch.rows_N])
    parts = prefixed.tokens_C[prefixed.shared :].split([length - prefixed.shared for length in batch.lengths])
    whole = torch.cat([torch.cat([prefixed.tokens_C[: prefixed.shared], part]) for part in parts])
    assert torch.equal(whole, batch.tokens_T)


def test_dropout_of_a_layer_or_of_the_config_is_found(folders: dict[str, Path]) -> None:
    ours = our_model(folders["llama"]).train()
    assert not uses_dropout(ours)
    ours.get_decoder().layers[0].mlp.dropout = torch.nn.Dropout(0.1)
    assert uses_dropout(ours) and not uses_dropout(ours.eval())
    ours = our_model(folders["llama"]).train()
    ours.config.attention_dropout = 0.1
    assert uses_dropout(ours)
