"""Answers equal transformers' greedy generation, independent of the batch, and generating does not change the model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, KINDS, NOT_PACKABLE, examples_of, microbatch_of, objective_of, our_model, save_tiny
from transformers import AutoModelForCausalLM, GenerationConfig

from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.model.attention import ATTENTION_NAME
from llamahome.model.generate import PromptCache, generate
from llamahome.model.lora import add_lora
from llamahome.model.place import place
from llamahome.model.sampling import Sampling

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [40], [33, 34, 35, 36]]
END = [2, 3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def theirs(folder: Path, prompt: list[int], *, count: int, ends: list[int]) -> list[int]:
    """The answer of transformers to one prompt, with eager attention, up to the end token."""
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


def test_the_generation_config_of_the_base_does_not_change_a_greedy_answer(llama: Path, tmp_path: Path) -> None:
    """Published models have penalties and temperatures in their generation config."""
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
def test_generating_restores_the_state_of_the_model(llama: Path, training: bool) -> None:
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


def test_generating_restores_the_state_of_the_model_after_an_error(llama: Path) -> None:
    model = our_model(llama).train()
    with pytest.raises(IndexError):
        generate(model, [[10_000]], end_ids=END, max_new_tokens=5)
    assert model.config._attn_implementation == ATTENTION_NAME and model.training


def test_tokens_are_passed_on_as_they_appear(llama: Path) -> None:
    streamed: list[int] = []
    model = our_model(llama)
    (answer,) = generate(model, PROMPTS[:1], end_ids=END, max_new_tokens=8, tell=streamed.extend)
    assert streamed[: len(answer)] == answer and set(streamed[len(answer) :]) <= set(END)


def test_a_seed_repeats_an_answer_and_leaves_the_generator_of_torch_alone(llama: Path) -> None:
    model, answers = our_model(llama), []
    state = torch.random.get_rng_state()
    for seed in (1, 1, 2, None, None):
        sampling = Sampling(temperature=2.0, seed=seed, max_new_tokens=12)
        answers.append(generate(model, PROMPTS, end_ids=[], sampling=sampling))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert answers[0] == answers[1] and len({str(answer) for answer in answers}) == 4
    alone = generate(model, PROMPTS[:1], end_ids=[], sampling=Sampling(temperature=2.0, seed=1, max_new_tokens=12))
    assert alone == answers[0][:1], "what a prompt is given does not depend on the others of its batch"


def test_a_stop_is_asked_after_each_token_and_ends_the_answer(llama: Path) -> None:
    model, streamed = our_model(llama), []
    (answer,) = generate(model, PROMPTS[:1], end_ids=[], max_new_tokens=20, tell=streamed.extend, stop=lambda: len(streamed) == 3)
    assert len(answer) == 3 and answer == streamed


@pytest.mark.parametrize("kind", [*KINDS, *NOT_PACKABLE])
def test_a_chat_with_kept_values_gives_the_answers_of_a_computation_from_the_beginning(tmp_path: Path, kind: str) -> None:
    """Turns that go on, that begin alike, that are shorter, and one that begins differently."""
    layers = {"num_hidden_layers": 3} if kind == "recurrent" else {}  # its first attention layer is the third
    model, cache = our_model(save_tiny(tmp_path, kind, **layers)), PromptCache()
    first = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    prompt, reused = first, []
    for turn in range(6):
        (expected,) = generate(model, [prompt], end_ids=[], max_new_tokens=7)
        (answer,) = generate(model, [prompt], end_ids=[], max_new_tokens=7, cache=cache)
        assert answer == expected, turn
        reused.append(cache.reused)
        prompt = {1: first, 2: [*first, 50, 51], 4: [60, 61, 62]}.get(turn, [*prompt, *answer, 30 + turn, 31, 32])
    assert reused[0] == 0 and reused[5] == 0, "nothing is known of the first prompt and of the one that differs"
    if kind in ("llama", "qwen3", "gpt2", "phi3"):
        assert reused[1] == 15, "all that was computed: nine tokens of the prompt, six of seven of the answer"
        assert reused[2] == 8, "all but the last token, because its logits are needed"
    if kind in ("state", "recurrent", "linear", "convolution"):
        assert set(reused) == {0}


def test_with_a_seed_an_answer_does_not_depend_on_what_was_asked_before(llama: Path) -> None:
    model, cache, prompt = our_model(llama, dtype=torch.bfloat16), PromptCache(), [*range(5, 45)]
    drawn = Sampling(temperature=1.0, seed=3, max_new_tokens=20)
    (alone,) = generate(model, [prompt], end_ids=[], sampling=drawn)
    for before in (None, prompt, [*prompt[:30], 9, 9, 9]):
        if before is not None:
            generate(model, [before], end_ids=[], sampling=replace(drawn, seed=None), cache=cache)
        assert generate(model, [prompt], end_ids=[], sampling=drawn, cache=cache) == [alone] and cache.reused == 0
    generate(model, [prompt], end_ids=[], sampling=replace(drawn, seed=None), cache=cache)
    assert cache.reused == len(prompt) - 1, "without a seed, answers differ anyway"


def test_values_are_not_kept_after_an_error(llama: Path) -> None:
    model, cache = our_model(llama), PromptCache()
    generate(model, PROMPTS[:1], end_ids=[], max_new_tokens=3, cache=cache)
    with pytest.raises(IndexError):
        generate(model, [[*PROMPTS[0], 10_000]], end_ids=[], max_new_tokens=3, cache=cache)
    assert cache.take(PROMPTS[0]) is None
