"""Answers equal transformers' own greedy generation, whatever else is in the batch, and leave the model as it was."""

import json
from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, KINDS, examples_of, microbatch_of, objective_of, our_model, save_tiny
from transformers import AutoModelForCausalLM, GenerationConfig

from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.model.attention import ATTENTION_NAME
from llamahome.model.generate import generate
from llamahome.model.lora import add_lora
from llamahome.model.place import place

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [40], [33, 34, 35, 36]]
END = [2, 3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def theirs(folder: Path, prompt: list[int], *, count: int, ends: list[int]) -> list[int]:
    """transformers alone, one prompt at a time, eager attention; the answer up to its end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=ends or None, pad_token_id=0)
    row = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=settings)[0]
    answer = row[len(prompt) :].tolist()
    return answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_equal_transformers_alone_with_any_padding(tmp_path: Path, kind: str) -> None:
    folder = save_tiny(tmp_path, kind)
    expected = [theirs(folder, prompt, count=12, ends=END) for prompt in PROMPTS]
    ours = our_model(folder)
    assert generate(ours, PROMPTS, end_ids=END, max_new_tokens=12) == expected
    assert [generate(ours, [prompt], end_ids=END, max_new_tokens=12)[0] for prompt in PROMPTS] == expected


def test_the_end_token_is_not_part_of_the_answer(llama: Path) -> None:
    model = our_model(llama)
    free = generate(model, PROMPTS, end_ids=[], max_new_tokens=10)
    assert [len(answer) for answer in free] == [10, 10, 10]
    for answer in free:
        end = answer[5]
        for cut, whole in zip(generate(model, PROMPTS, end_ids=[end], max_new_tokens=10), free, strict=True):
            assert cut == whole[: whole.index(end) if end in whole else 10]


def test_settings_of_the_base_do_not_change_a_greedy_answer(llama: Path, tmp_path: Path) -> None:
    """Published models bring penalties and temperatures of their own; a sample that shows what training did wants none of them."""
    save_tiny(tmp_path)
    brought = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 3,
        "top_p": 0.9,
        "repetition_penalty": 3.0,
        "max_length": 12,
        "eos_token_id": [9],
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(brought))
    expected = generate(our_model(llama), PROMPTS, end_ids=END, max_new_tokens=12)
    assert generate(our_model(tmp_path), PROMPTS, end_ids=END, max_new_tokens=12) == expected


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(llama: Path, training: bool) -> None:
    model = our_model(llama)
    add_lora(model, LoraConfig(rank=2, dropout=0.5), base="tiny", seed=0, lean=True)
    place(model, world=World(0, 1, 0, CPU), checkpointing=True, sync_batch_norm=False)
    model.train(training)
    before = objective_loss(model), model.config.use_cache, torch.random.get_rng_state()
    answer = generate(model, PROMPTS, end_ids=END, max_new_tokens=5)
    assert model.config._attn_implementation == ATTENTION_NAME and model.config.use_cache == before[1]
    assert all(module.training == training for module in model.modules()) and torch.equal(torch.random.get_rng_state(), before[2])
    assert torch.equal(objective_loss(model), before[0])
    assert generate(model, PROMPTS, end_ids=END, max_new_tokens=5) == answer, "dropout was on"


def objective_loss(model) -> torch.Tensor:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    loss = objective_of(model).loss_sum(microbatch_of(examples_of([9, 4])))
    loss.backward()  # recomputation must find what the forward pass found
    torch.random.set_rng_state(state)
    return loss.detach()


def test_the_model_is_left_as_it_was_when_something_breaks(llama: Path) -> None:
    model = our_model(llama).train()
    with pytest.raises(IndexError):
        generate(model, [[10_000]], end_ids=END, max_new_tokens=5)
    assert model.config._attn_implementation == ATTENTION_NAME and model.training


def test_tokens_are_told_as_they_come(llama: Path) -> None:
    told: list[int] = []
    model = our_model(llama)
    (answer,) = generate(model, PROMPTS[:1], end_ids=END, max_new_tokens=8, tell=told.extend)
    assert told[: len(answer)] == answer and set(told[len(answer) :]) <= set(END)


def test_a_temperature_samples_from_the_generator_of_torch(llama: Path) -> None:
    model, answers = our_model(llama), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(generate(model, PROMPTS, end_ids=[], max_new_tokens=12, temperature=2.0))
    assert answers[0] == answers[1] != answers[2]
