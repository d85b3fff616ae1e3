"""The rotary tables of a document depend only on the document, in training, evaluation and generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import CPU, backend_named, examples_of, microbatch_of, objective_of, our_model, plain_loss, save_tiny
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from llamahome.distributed.world import World
from llamahome.model.generate import generate
from llamahome.model.objective import Objective
from llamahome.model.packing import packing_of
from llamahome.model.place import place

_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [4.0] * 4,
    "short_factor": [1.0] * 4,
    "original_max_position_embeddings": 16,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
GROWING: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 16, "max_position_embeddings": 64}),
    "dynamic": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 16}),
    "dynamic-windows": ("mistral", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 16}),
}
PLAIN: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "rope_theta": 1e4,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
LENGTHS = [(5, 40, 9), (40, 5), (17, 16, 15, 30)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("growing")
    return {name: save_tiny(root / name, kind, **changes) for name, (kind, changes) in GROWING.items()}


def theirs(folder: Path) -> PreTrainedModel:
    """The model of transformers, just loaded."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_documents_in_any_order_have_the_loss_of_each_document_alone(folders: dict[str, Path], name: str, backend: str) -> None:
    ours = our_model(folders[name])
    assert packing_of(ours).rotaries and packing_of(ours).why_alone is None
    for lengths in LENGTHS:  # one after the other, because a pass might leave state behind
        examples = examples_of(lengths)
        with torch.no_grad():
            actual = objective_of(ours, backend).loss_sum(microbatch_of(examples))
            expected = sum(plain_loss(theirs(folders[name]), example) for example in examples)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=5))
def test_the_loss_of_a_pass_is_the_sum_of_the_document_losses(folders: dict[str, Path], lengths: list[int]) -> None:
    for folder in folders.values():
        ours, examples = our_model(folder), examples_of(lengths)
        with torch.no_grad():
            alone = sum(objective_of(ours).loss_sum(microbatch_of([example])) for example in examples)
            torch.testing.assert_close(objective_of(ours).loss_sum(microbatch_of(examples)), alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_each_document_alone(folders: dict[str, Path], name: str, checkpointing: bool) -> None:
    ours, examples = our_model(folders[name]), examples_of(LENGTHS[0])
    place(ours, world=World(0, 1, 0, CPU), checkpointing=checkpointing, sync_batch_norm=False)
    Objective(ours, backend_named("cpu")).loss_sum(microbatch_of(examples)).backward()
    summed: dict[str, torch.Tensor] = {}
    for example in examples:
        plain = theirs(folders[name])
        plain_loss(plain, example).backward()
        for each, parameter in plain.named_parameters():
            summed[each] = summed.get(each, torch.zeros(())) + parameter.grad
    for each, parameter in ours.named_parameters():
        assert (parameter.grad - summed[each]).norm() <= 1e-5 * (summed[each].norm() + 1e-6), each


@pytest.mark.parametrize("name", GROWING)
def test_answers_equal_those_of_a_model_just_loaded(folders: dict[str, Path], name: str) -> None:
    """Prompts that grow beyond the length at which the tables change, after longer passes."""
    ours, prompts = our_model(folders[name]), [list(range(5, 19)), list(range(30, 60)), [40, 41]]
    with torch.no_grad():
        objective_of(ours).loss_sum(microbatch_of(examples_of((40, 3))))
    options = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        generated = theirs(folders[name]).generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=options)
        expected.append(generated[0, len(prompt) :].tolist())
    assert generate(ours, prompts, end_ids=[], max_new_tokens=8) == expected
    assert [generate(ours, [prompt], end_ids=[], max_new_tokens=8)[0] for prompt in prompts] == expected


@pytest.mark.parametrize("name", PLAIN)
def test_tables_that_do_not_depend_on_the_length_are_not_wrapped(tmp_path: Path, name: str) -> None:
    ours = our_model(save_tiny(tmp_path, "llama", rope_parameters=PLAIN[name], max_position_embeddings=64))
    assert not packing_of(ours).rotaries and packing_of(ours).shares_prefixes
