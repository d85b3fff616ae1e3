"""Which end token is learned, what is reported about it before training, and that the suggested setting helps."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.support.models import save_tiny
from tests.support.templates import CHATML, FAMILIES
from transformers import AutoTokenizer, GenerationConfig

from llamahome.data.records import Conversation, Row
from llamahome.data.text.end_tokens import learned_ends, notes_of
from llamahome.data.text.targets import Tokenized, tokenize
from llamahome.data.text.tokens import ChatTokenizer, load_tokenizer
from llamahome.errors import ConfigError
from llamahome.model.end_tokens import name_ends, name_eos

QUIET = CHATML.replace("<|im_end|>", "")
"""Writes no token after an answer."""


def folder_of(folder: Path, *, eos: str | None = "<|im_end|>", template: str = CHATML, stops: Any = None) -> Path:
    made = FAMILIES["ChatML"].tokenizer(template)
    made.eos_token = eos
    made.save_pretrained(folder)
    if stops is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "top_p": 0.9}))
    return folder


def last_token(tokenizer: ChatTokenizer, *, text: str | None = None) -> int:
    turns = () if text else ({"role": "user", "content": "what"}, {"role": "assistant", "content": "that"})
    (whole,) = tokenize([Conversation(Row(0, "x.jsonl", 1, {}), turns=turns, text=text)], tokenizer, train_on="assistant")
    assert isinstance(whole, Tokenized) and whole.targets.any()
    return int(whole.tokens[whole.targets.nonzero()[0][-1]])


def test_nothing_is_reported_if_all_files_agree(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, stops=FAMILIES["ChatML"].tokenizer().eos_token_id))
    assert notes_of(tokenizer, chats=True) == notes_of(tokenizer, chats=False) == ()
    assert learned_ends(tokenizer, chats=True) == (tokenizer.eos_id,) == (last_token(tokenizer),)


@pytest.mark.parametrize(("template", "chats"), [(CHATML, False), (QUIET, True), (QUIET, False)])
def test_without_an_end_token_the_suggested_setting_makes_one_learned(tmp_path: Path, template: str, chats: bool) -> None:
    bare = load_tokenizer(folder_of(tmp_path, eos=None, template=template))
    warning, helped = notes_of(bare, chats=chats)
    assert warning.startswith("warning: no end is learned") and learned_ends(bare, chats=chats) == ()
    setting, token = shlex.split(helped)[2].split("=", 1)
    assert setting == "model.eos_token"
    mended = load_tokenizer(tmp_path, eos_token=token)
    assert not any("no end is learned" in note for note in notes_of(mended, chats=chats))
    assert (last_token(mended, text=None if chats else "some words"),) == learned_ends(mended, chats=chats) == (mended.eos_id,)
    name_eos(tmp_path, token)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == token
    assert load_tokenizer(tmp_path).fingerprint == mended.fingerprint, "what is saved opens as it was trained"


def test_an_end_token_that_the_model_names_is_suggested_first(tmp_path: Path) -> None:
    start = FAMILIES["ChatML"].tokenizer().convert_tokens_to_ids("<|im_start|>")
    tokenizer = load_tokenizer(folder_of(tmp_path, eos=None, template=QUIET, stops=[start]))
    assert "<|im_start|>" in notes_of(tokenizer, chats=False)[1]


def test_an_unknown_token_is_refused_and_the_nearest_suggested(tmp_path: Path) -> None:
    folder_of(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path, eos_token="<|im_ending|>")
    assert caught.value.problems[0].code == "model.unknown-token" and "<|im_end|>" in str(caught.value.problems[0].hint)


def test_both_tokens_are_named_if_turns_end_in_another_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, eos="<|endoftext|>", stops=[FAMILIES["ChatML"].tokenizer().pad_token_id]))
    (note,) = notes_of(tokenizer, chats=True)
    assert f"(id {tokenizer.added_tokens['<|im_end|>']})" in note and f"(id {tokenizer.eos_id})" in note
    assert learned_ends(tokenizer, chats=True) == (tokenizer.added_tokens["<|im_end|>"],) == (last_token(tokenizer),)
    assert learned_ends(tokenizer, chats=False) == (tokenizer.eos_id,)


def test_an_end_token_that_the_template_does_not_write_is_reported_as_added(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, template=QUIET))
    (note,) = notes_of(tokenizer, chats=True)
    assert "writes no token after an answer" in note and "<|im_end|>" in note
    assert learned_ends(tokenizer, chats=True) == (last_token(tokenizer),)


@pytest.mark.parametrize(
    ("known", "learned", "expected"), [([7, 9], (3,), [7, 9, 3]), (7, (3,), [7, 3]), (3, (3,), 3), (None, (3,), 3), ([3, 7], (3,), [3, 7])]
)
def test_learned_end_tokens_follow_those_of_the_base(tmp_path: Path, known: Any, learned: tuple[int, ...], expected: Any) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": known, "top_p": 0.5, "_from_model_config": True}))
    before = path.read_bytes()
    name_ends(tmp_path, tmp_path, learned)
    assert json.loads(path.read_text())["eos_token_id"] == expected
    assert json.loads(path.read_text())["top_p"] == 0.5
    assert (path.read_bytes() == before) == (known == expected)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == expected


def test_without_a_generation_config_one_is_written_that_keeps_the_end_of_the_config(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    (base / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}))
    (tmp_path / "final").mkdir()
    name_ends(tmp_path / "final", base, (5,))
    assert json.loads((tmp_path / "final/generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": [2, 5],
    }
