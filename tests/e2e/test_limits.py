"""Every command holds the limits of a model against the rows, as a user types it."""

import json
import re
import shutil

import pytest
from tests.support.models import VOCABULARY, save_tiny
from tests.support.projects import Project, write_rows
from tests.support.tokenizers import save_tokenizer
from transformers import AutoTokenizer

POSITIONS = 48
LONG = {"prompt": "What is the capital?", "completion": "Paris " * 60}


def with_model(project: Project, kind: str, **changes: object) -> None:
    folder = project.folder / "data/models/base/tiny"
    shutil.rmtree(folder)
    save_tiny(folder, kind, **changes)


def typed(project: Project, verb: str) -> tuple[str, ...]:
    more = {"train": ("--output", "out", "--max-steps", "1"), "data check": ("--model", "tiny"), "plan": ()}[verb]
    return (*verb.split(), "long.jsonl", *more)


@pytest.mark.parametrize("verb", ["data check", "plan", "train"])
def test_a_table_of_positions_cuts_rows_and_the_cut_is_counted(project: Project, verb: str) -> None:
    with_model(project, "gpt2", n_positions=POSITIONS, max_position_embeddings=POSITIONS)
    write_rows(project.folder / "long.jsonl", [LONG] * 4 + [{"prompt": f"{n}?", "completion": f"{n}"} for n in range(12)])
    answer = project.type(*typed(project, verb))
    assert answer.codes == ["data.too-much-lost"] and answer.status == 3 and f"2,048 -> {POSITIONS}" in answer.err
    assert all(int(length) <= POSITIONS for line in answer.helps for length in re.findall(r"max_length=(\d+)", line))
    share = next(found for line in answer.helps for found in re.findall(r"data\.max_lost_share=[\d.]+", line))
    assert project.type(*typed(project, verb), "--set", share).status == 0


@pytest.mark.parametrize("verb", ["data check", "plan", "train"])
def test_one_warning_tells_both_lengths_of_rows_beyond_what_was_trained(project: Project, verb: str) -> None:
    with_model(project, "llama", max_position_embeddings=40)
    for rows, warned in (([LONG] * 2, 1), ([{"prompt": "a", "completion": "b"}] * 2, 0)):
        write_rows(project.folder / "long.jsonl", rows)
        answer = project.type(*typed(project, verb))
        lines = [line for line in answer.err.splitlines() if "was trained on at most 40" in line]
        assert len(lines) == warned, answer.err
        shutil.rmtree(project.folder / "out", ignore_errors=True)


@pytest.mark.parametrize("verb", ["data check", "plan", "train"])
def test_a_tokenizer_too_large_is_refused_with_both_numbers_and_its_help_mends_it(project: Project, verb: str) -> None:
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
    mended = project.type(*typed(project, verb), "--set", setting)
    assert mended.status == 0, mended.err
    if verb == "train":
        assert json.loads((project.folder / "out/final/adapter_config.json").read_text())["trainable_token_indices"]
        assert project.type("train-eval", "out", "long.jsonl", "--json").status == 0
        assert project.type("train-resume", "out", "--set", "training.max_steps=2").status == 0
