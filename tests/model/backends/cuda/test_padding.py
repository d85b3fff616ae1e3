"""Passes come in few sizes; what fills them up changes nothing, and no new length compiles anything."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import CPU, FP32, examples_of, microbatch_of, our_model, save_tiny
from tests.support.varlen import stand_in
from torch import Tensor

from llamahome.data.records import Example
from llamahome.data.steps.loader import idle_microbatch
from llamahome.model.backends.choose import backend_of
from llamahome.model.backends.cuda.passes import padded_size, padding_of
from llamahome.model.load import CausalLM
from llamahome.model.objective import Objective


def unlearned(example: Example) -> Example:
    return Example(example.source, example.row, example.line, example.tokens, np.zeros_like(example.targets))


def passed(model: CausalLM, examples: list[Example]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    backend = backend_of("cuda", CPU, FP32)
    loss = Objective(model, backend).loss_sum(backend.deliver(microbatch_of(examples)))
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_padding_is_a_document_that_nothing_is_learned_from(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    model = our_model(save_tiny(tmp_path / kind, kind)).train()
    examples = examples_of([40, 9, 71])
    rest = [unlearned(example) for example in examples_of([100, 36], seed=1)]
    (with_padding, grads), (without, others) = passed(model, examples), passed(model, [*examples, *rest])
    assert with_padding.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    assert torch.equal(with_padding, without)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]) or "embed" in name, name


def test_real_tokens_are_counted_padding_is_not() -> None:
    backend = backend_of("cuda", CPU, FP32)
    laid_out = microbatch_of(examples_of([40, 9, 71]))
    there = backend.deliver(laid_out)
    assert (there.num_tokens, there.num_targets, there.lengths) == (120, laid_out.num_targets, laid_out.lengths)
    assert len(there.tokens_T) == len(there.positions_T) == 256
    assert torch.equal(there.tokens_T[:120], laid_out.tokens_T) and torch.equal(there.labels_N, laid_out.labels_N)
    assert not there.tokens_T[120:].any() and there.positions_T[120:].tolist() == list(range(136))
    assert there.documents.starts.tolist() == [0, 40, 49, 120, 256]
    parts = (there.tokens_T, there.positions_T, there.rows_N, there.labels_N, there.documents.starts)
    assert len({each.untyped_storage().data_ptr() for each in parts}) == 1, "one copy for all"


def test_a_pass_without_targets_has_a_loss_of_zero_and_gradients(tmp_path: Path) -> None:
    model, backend = our_model(save_tiny(tmp_path / "llama")).train(), backend_of("cuda", CPU, FP32)
    loss = Objective(model, backend).loss_sum(backend.deliver(idle_microbatch(index=0)))
    loss.backward()
    assert loss == 0 and all(each.grad is None or not each.grad.any() for each in model.parameters())


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20))
def test_padding_fills_a_pass_up_with_documents_no_longer_than_the_longest(lengths: list[int]) -> None:
    total, more = sum(lengths), padding_of(tuple(lengths))
    assert total + sum(more) == padded_size(total)
    assert all(0 < length <= max(*lengths, 256) for length in more)


@given(st.integers(1, 200_000))
def test_sizes_of_passes_are_few_and_close(tokens: int) -> None:
    size = padded_size(tokens)
    assert tokens <= size and padded_size(size) == size and size % 256 == 0
    assert tokens < 1024 or size <= 1.25 * tokens


def test_a_run_meets_a_handful_of_sizes() -> None:
    assert [padded_size(each) for each in (1, 257, 1000, 4097, 8192, 12_289)] == [256, 512, 1024, 5120, 8192, 14_336]
    assert len({padded_size(each) for each in range(8_193, 16_385)}) == 4


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_thirty_steps_of_any_lengths_compile_nothing_after_the_warm_up(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, compiler=compiler)
    model, backend = our_model(save_tiny(tmp_path / "gemma3", "gemma3")).train(), backend_of("cuda", CPU, FP32)
    backend.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective, random = Objective(model, backend), np.random.default_rng(0)

    def step(lengths: list[int], seed: int) -> None:
        objective.loss_sum(backend.deliver(microbatch_of(examples_of(lengths, seed=seed)))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for tokens in (200, 500):
        step([tokens], 0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(30):
            step(random.integers(1, 60, random.integers(1, 9)).tolist(), number)
        objective.stats(backend.deliver(microbatch_of(examples_of([17, 400]))))
