"""Every command checks the rows against the limits of the model."""

import json
import re
import shlex
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.support.models import VOCABULARY, save_tiny
from tests.support.projects import Project, write_rows
from tests.support.tokenizers import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

POSITIONS = 48
LONG = {"prompt": "What is the capital?", "completion": "Paris " * 60}


def with_model(project: Project, kind: str, **changes: object) -> None:
    folder = project.folder / "data/models/base/tiny"
    shutil.rmtree(folder)
    save_tiny(folder, kind, **changes)


def typed(project: Project, verb: str) -> tuple[str, ...]:
    more = {"train": ("--output", "out", "--max-steps", "1"), "plan": ()}.get(verb, ("--model", "tiny"))
    return (*verb.split(), "long.jsonl", *more)


@pytest.mark.parametrize("verb", ["data check", "data prepare", "plan", "train"])
def test_rows_longer_than_the_position_table_are_cut_and_counted(project: Project, verb: str) -> None:
    with_model(project, "gpt2", n_positions=POSITIONS, max_position_embeddings=POSITIONS)
    write_rows(project.folder / "long.jsonl", [LONG] * 4 + [{"prompt": f"{n}?", "completion": f"{n}"} for n in range(12)])
    answer = project.type(*typed(project, verb))
    assert answer.codes == ["data.too-much-lost"] and answer.status == 3 and f"2,048 -> {POSITIONS}" in answer.err
    assert all(int(length) <= POSITIONS for line in answer.helps for length in re.findall(r"max_length=(\d+)", line))
    share = next(found for line in answer.helps for found in re.findall(r"data\.max_lost_share=[\d.]+", line))
    assert project.type(*typed(project, verb), "--set", share).status == 0


def test_training_finds_the_rows_that_were_prepared_within_the_positions_of_the_model(project: Project) -> None:
    with_model(project, "gpt2", n_positions=POSITIONS, max_position_embeddings=POSITIONS)
    for words in (("data", "prepare", "chats.jsonl", "--model", "tiny"), ("train", "chats.jsonl", "--max-steps", "1")):
        project.type(*words, "--set", "data.max_lost_share=1").expect(0)
        assert len(list((project.folder / "data/training/processed").iterdir())) == 1


@pytest.mark.parametrize("verb", ["data check", "data prepare", "plan", "train"])
def test_one_warning_names_the_trained_length_and_the_length_of_longer_rows(project: Project, verb: str) -> None:
    with_model(project, "llama", max_position_embeddings=40)
    for rows, warned in (([LONG] * 2, 1), ([{"prompt": "a", "completion": "b"}] * 2, 0)):
        write_rows(project.folder / "long.jsonl", rows)
        answer = project.type(*typed(project, verb))
        lines = [line for line in answer.err.splitlines() if "was trained on at most 40" in line]
        assert len(lines) == warned, answer.err
        shutil.rmtree(project.folder / "out", ignore_errors=True)


@pytest.mark.parametrize("verb", ["data check", "data prepare", "plan", "train"])
def test_a_too_large_tokenizer_is_refused_with_both_sizes_and_the_help_fixes_it(project: Project, verb: str) -> None:
    folder = save_tokenizer(project.folder / "data/models/base/tiny", vocabulary=VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = [f"<new{number}>" for number in range(VOCABULARY + 3 - len(tokenizer))]
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    write_rows(project.folder / "long.jsonl", [{"prompt": f"{n} {added[-1]}?", "completion": f"{added[-1]} {n}"} for n in range(8)])
    refused = project.type(*typed(project, verb))
    assert refused.codes == ["model.tokenizer-too-large"] and refused.status == 2
    assert str(VOCABULARY) in refused.err and str(VOCABULARY + 3) in refused.err
    setting = next(found for line in refused.helps for found in re.findall(r"--set (model\.\S+)", line))
    fixed = project.type(*typed(project, verb), "--set", setting)
    assert fixed.status == 0, fixed.err
    if verb == "train":
        assert json.loads((project.folder / "out/final/adapter_config.json").read_text())["trainable_token_indices"]
        assert project.type("train-eval", "out", "long.jsonl", "--json").status == 0
        assert project.type("train-resume", "out", "--set", "training.max_steps=2").status == 0


VERBS = {
    "data check": ("data", "check", "chats.jsonl", "--model", "tiny"),
    "data prepare": ("data", "prepare", "chats.jsonl", "--model", "tiny"),
    "plan": ("plan", "chats.jsonl"),
    "train": ("train", "chats.jsonl", "--output", "out", "--max-steps", "1", "--set", "evaluation.sample_prompts=0"),
    "train-eval": ("train-eval", "tiny", "chats.jsonl"),
    "chat": ("chat", "tiny", "--prompt", "a", "--max-new-tokens", "1"),
}


def set_keys(project: Project, file: str, **values: object) -> None:
    """Set keys in a JSON file of the model; None removes a key."""
    path = project.folder / "data/models/base/tiny" / file
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.medium
def test_every_command_warns_of_special_tokens_without_a_row_and_none_saves_them(project: Project) -> None:
    set_keys(project, "config.json", pad_token_id=VOCABULARY, bos_token_id=9999)
    set_keys(project, "generation_config.json", eos_token_id=[2, 8888], pad_token_id=7777)
    for words in VERBS.values():
        warned = [line for line in project.type(*words).expect(0).err.splitlines() if line.startswith("warning: the embedding has")]
        assert len(warned) == 1
        for number in (f"{VOCABULARY} rows", f"pad_token_id {VOCABULARY} (config.json)", "bos_token_id 9,999", "8,888", "7,777"):
            assert number in warned[0]
    saved = json.loads((project.folder / "out/final/generation_config.json").read_text())
    assert saved["eos_token_id"] == [2] and "pad_token_id" not in saved


def test_a_padding_id_of_minus_one_means_no_padding_token(project: Project) -> None:
    set_keys(project, "config.json", pad_token_id=-1)
    assert "warning: the embedding" not in project.type(*VERBS["train"]).expect(0).err


@pytest.mark.medium
def test_every_command_refuses_a_model_whose_end_tokens_have_no_row_and_the_help_fixes_it(project: Project) -> None:
    for file in ("config.json", "generation_config.json"):
        set_keys(project, file, eos_token_id=9999)
    set_keys(project, "tokenizer_config.json", eos_token=None)
    (project.folder / "data/models/base/tiny/chat_template.jinja").unlink()
    write_rows(project.folder / "chats.jsonl", [{"text": f"{number} is a number"} for number in range(20)])
    for verb, words in VERBS.items():
        refused = project.type(*words).expect(2)
        assert refused.codes == ["model.lost-end"] and "eos_token_id 9,999 (config.json)" in refused.err
        fixed = project.type(*words, *shlex.split(refused.helps[0])[:2])
        assert fixed.status == 0 or (verb == "chat" and fixed.codes == ["data.no-chat-template"])
    assert json.loads((project.folder / "out/final/generation_config.json").read_text())["eos_token_id"] < VOCABULARY


@pytest.mark.parametrize("rows", [VOCABULARY - 10, VOCABULARY + 10])
def test_weights_whose_rows_differ_from_the_config_are_refused_with_both_numbers(project: Project, rows: int) -> None:
    weights = project.folder / "data/models/base/tiny/model.safetensors"
    content = load_file(weights)
    table_VD = content["model.embed_tokens.weight"]
    content["model.embed_tokens.weight"] = torch.cat([table_VD, table_VD])[:rows].contiguous()
    save_file(content, weights, metadata={"format": "pt"})
    for words in VERBS.values():
        refused = project.type(*words).expect(2)
        assert refused.codes == ["model.other-vocabulary"]
        assert f"vocab_size {VOCABULARY}" in refused.err and f"{rows} rows" in refused.err
    assert f'"vocab_size": {rows}' in refused.helps[0]
    set_keys(project, "config.json", vocab_size=rows)
    fixed = project.type(*VERBS["train"])
    assert fixed.status == 0 or fixed.codes == ["model.tokenizer-too-large"]


def test_a_config_value_of_the_wrong_type_is_refused_and_named(project: Project) -> None:
    set_keys(project, "config.json", eos_token_id="2")
    for verb in ("plan", "train", "train-eval", "chat"):
        refused = project.type(*VERBS[verb]).expect(2)
        assert "'eos_token_id' with value '2'" in refused.err


def test_weights_whose_shape_differs_from_the_config_are_named_with_both_shapes(project: Project) -> None:
    set_keys(project, "config.json", intermediate_size=64)
    refused = project.type(*VERBS["train"]).expect(2)
    assert refused.codes == ["model.unreadable"] and "ignore_mismatched" not in refused.err
    assert "gate_proj.weight is 48 x 32 in the weights' files, and 64 x 32 by config.json" in refused.err


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's own, of the adapter that is made here
@pytest.mark.parametrize(("rows", "status"), [(VOCABULARY, 0), (VOCABULARY - 1, 2), (VOCABULARY + 1, 2)])
def test_an_adapter_of_a_base_with_another_vocabulary_is_refused_with_both_numbers(project: Project, rows: int, status: int) -> None:
    base = AutoModelForCausalLM.from_pretrained(project.folder / "data/models/base/tiny")
    base.resize_token_embeddings(rows, mean_resizing=False)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    adapted.save_pretrained(project.folder / "adapter", save_embedding_layers=False)
    save_tokenizer(project.folder / "adapter", vocabulary=VOCABULARY)
    path = project.folder / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny"}))
    answer = project.type("train-eval", "adapter", "chats.jsonl").expect(status)
    if status:
        assert answer.codes == ["model.other-vocabulary"]
        assert f"with {rows} rows" in answer.err and f"tiny has {VOCABULARY}" in answer.err
