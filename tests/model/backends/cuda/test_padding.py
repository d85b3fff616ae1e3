"""Passes come in few sizes, padding changes no result, and new lengths compile nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import CPU, FP32, examples_of, microbatch_of, our_model, save_tiny
from tests.support.varlen import use_plain_varlen
from torch import Tensor

from llamahome.data.records import Example
from llamahome.data.steps.loader import idle_microbatch
from llamahome.model.backends.choose import backend_of
from llamahome.model.backends.cuda.passes import padded_size, padding_of
from llamahome.model.load import CausalLM
from llamahome.model.objective import Objective


def without_targets(example: Example) -> Example:
    return Example(example.source, example.row, example.line, example.tokens, np.zeros_like(example.targets))


def loss_and_gradients(model: CausalLM, examples: list[Example]) -> tuple[Tensor, dict[str, Tensor]]:
    backend = backend_of("cuda", CPU, FP32)
    loss = Objective(model, backend).loss_sum(backend.to_device(microbatch_of(examples)))
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_padding_equals_documents_without_targets(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_varlen(monkeypatch)
    model = our_model(save_tiny(tmp_path / kind, kind)).train()
    examples = examples_of([40, 9, 71])
    rest = [without_targets(example) for example in examples_of([100, 36], seed=1)]
    (with_padding, grads), (without, others) = loss_and_gradients(model, examples), loss_and_gradients(model, [*examples, *rest])
    assert with_padding.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    assert torch.equal(with_padding, without)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]) or "embed" in name, name


def test_tokens_are_counted_without_padding() -> None:
    backend = backend_of("cuda", CPU, FP32)
    batch = microbatch_of(examples_of([40, 9, 71]))
    copied = backend.to_device(batch)
    assert (copied.num_tokens, copied.num_targets, copied.lengths) == (120, batch.num_targets, batch.lengths)
    assert len(copied.tokens_T) == len(copied.positions_T) == 256
    assert torch.equal(copied.tokens_T[:120], batch.tokens_T) and torch.equal(copied.labels_N, batch.labels_N)
    assert not copied.tokens_T[120:].any() and copied.positions_T[120:].tolist() == list(range(136))
    assert copied.documents.starts.tolist() == [0, 40, 49, 120, 256]
    parts = (copied.tokens_T, copied.positions_T, copied.rows_N, copied.labels_N, copied.documents.starts)
    assert len({tensor.untyped_storage().data_ptr() for tensor in parts}) == 1, "all parts are copied at once"


def test_a_pass_without_targets_has_a_loss_of_zero_and_gradients(tmp_path: Path) -> None:
    model, backend = our_model(save_tiny(tmp_path / "llama")).train(), backend_of("cuda", CPU, FP32)
    loss = Objective(model, backend).loss_sum(backend.to_device(idle_microbatch(index=0)))
    loss.backward()
    assert loss == 0 and all(tensor.grad is None or not tensor.grad.any() for tensor in model.parameters())


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20))
def test_padding_documents_are_no_longer_than_the_longest(lengths: list[int]) -> None:
    total, more = sum(lengths), padding_of(tuple(lengths))
    assert total + sum(more) == padded_size(total)
    assert all(0 < length <= max(*lengths, 256) for length in more)


@given(st.integers(1, 200_000))
def test_padded_sizes_are_multiples_and_close(tokens: int) -> None:
    size = padded_size(tokens)
    assert tokens <= size and padded_size(size) == size and size % 256 == 0
    assert tokens < 1024 or size <= 1.25 * tokens


def test_there_are_few_padded_sizes() -> None:
    assert [padded_size(tensor) for tensor in (1, 257, 1000, 4097, 8192, 12_289)] == [256, 512, 1024, 5120, 8192, 14_336]
    assert len({padded_size(tensor) for tensor in range(8_193, 16_385)}) == 4


@pytest.mark.medium
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_thirty_steps_of_any_lengths_compile_nothing_after_the_warm_up(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_plain_varlen(monkeypatch, compiler=compiler)
    model, backend = our_model(save_tiny(tmp_path / "gemma3", "gemma3")).train(), backend_of("cuda", CPU, FP32)
    backend.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective, random = Objective(model, backend), np.random.default_rng(0)

    def step(lengths: list[int], seed: int) -> None:
        objective.loss_sum(backend.to_device(microbatch_of(examples_of(lengths, seed=seed)))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for tokens in (200, 500):
        step([tokens], 0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(30):
            step(random.integers(1, 60, random.integers(1, 9)).tolist(), number)
        objective.stats(backend.to_device(microbatch_of(examples_of([17, 400]))))
