"""The results on packed documents equal those of transformers on each document alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.models import (
    FP32,
    KINDS,
    backend_named,
    examples_of,
    microbatch_of,
    objective_of,
    our_model,
    plain_loss,
    plain_model,
    save_tiny,
)

from llamahome.model.backends.backend import Documents
from llamahome.model.packing import last_hidden
from llamahome.model.precision import Precision

LENGTHS = (40, 17, 23, 2, 9, 1)
BACKENDS = ("cpu", "cuda", "reference")
CASES = [(kind, backend) for kind in KINDS for backend in BACKENDS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_hidden_states_and_loss_equal_those_of_each_document_alone(folders: dict[str, Path], kind: str, backend: str) -> None:
    ours, plain, examples = our_model(folders[kind]), plain_model(kind), examples_of(LENGTHS)
    batch = microbatch_of(examples)
    with torch.no_grad():
        actual = last_hidden(ours, batch.tokens_T, batch.positions_T, Documents(batch.lengths), attend=backend_named(backend).attend)
        alone = [torch.from_numpy(example.tokens.astype(np.int64))[None] for example in examples]
        expected = torch.cat([plain.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0] for tokens in alone])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        loss = objective_of(ours, backend).loss_sum(batch)
        torch.testing.assert_close(loss, sum(plain_loss(plain, example) for example in examples[:-1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_weight_equal_those_of_each_document_alone(folders: dict[str, Path], kind: str) -> None:
    ours, plain, examples = our_model(folders[kind]), plain_model(kind), examples_of(LENGTHS[:4])
    objective_of(ours).loss_sum(microbatch_of(examples)).backward()
    sum(plain_loss(plain, example) for example in examples).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if expected[name].grad is None:  # an expert that no token reached
            assert parameter.grad is None
            continue
        # The gradient of a bias of keys is a sum that cancels, because the softmax hardly sees it: that of the weight is the scale.
        scale = expected[name.replace("k_proj.bias", "k_proj.weight")].grad.norm()
        distance = (parameter.grad - expected[name].grad).norm() / (scale + 1e-6)
        assert distance < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_the_loss_and_the_targets_ranked_first(folders: dict[str, Path], kind: str) -> None:
    ours, plain, examples = our_model(folders[kind]), plain_model(kind), examples_of(LENGTHS[:3], target_share=1.0)
    stats = objective_of(ours).stats(microbatch_of(examples))
    correct = 0
    for example in examples:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        correct += int((plain(input_ids=tokens[None]).logits[0, :-1].argmax(-1) == tokens[1:]).sum())
    torch.testing.assert_close(stats.loss_sum, sum(plain_loss(plain, example) for example in examples).detach(), rtol=1e-5, atol=0)
    assert int(stats.correct) == correct


def test_the_caps_of_gemma2_change_the_loss(folders: dict[str, Path]) -> None:
    ours, examples = our_model(folders["gemma2"]), examples_of(LENGTHS[:3])
    with torch.no_grad():
        capped = objective_of(ours).loss_sum(microbatch_of(examples))
        for attention in (layer.self_attn for layer in ours.get_decoder().layers):
            attention.attn_logit_softcapping = None
        uncapped_scores = objective_of(ours).loss_sum(microbatch_of(examples))
        ours.config.final_logit_softcapping = None
        uncapped_logits = objective_of(ours).loss_sum(microbatch_of(examples))
    assert abs(capped - uncapped_scores) > 1 and abs(uncapped_scores - uncapped_logits) > 1


def test_a_micro_batch_without_targets_has_no_loss_and_no_gradient(folders: dict[str, Path]) -> None:
    ours, examples = our_model(folders["llama"]), examples_of([1, 1])
    loss = objective_of(ours).loss_sum(microbatch_of(examples))
    loss.backward()
    assert loss == 0 and all(parameter.grad is None or not parameter.grad.any() for parameter in ours.parameters())


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_bfloat16_products_are_close_to_float32(folders: dict[str, Path], storage: torch.dtype) -> None:
    """Each of about ten roundings to 8 bits changes the mean loss by a few thousandths."""
    examples = examples_of(LENGTHS)
    exact = objective_of(our_model(folders["llama"])).loss_sum(microbatch_of(examples))
    for backend in BACKENDS:
        low = objective_of(our_model(folders["llama"], dtype=storage), backend, Precision(storage, torch.bfloat16, "a test"))
        loss = low.loss_sum(microbatch_of(examples))
        loss.backward()
        assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02 * exact


def test_the_precision_of_tests_is_float32() -> None:
    assert not FP32.autocast and FP32.name == "no"
