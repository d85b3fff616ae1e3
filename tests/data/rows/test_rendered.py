"""Chats that were rendered already are told: as texts their questions are learned, as questions they would be rendered twice."""

import json
from pathlib import Path

import pytest
from tests.support.tokenizers import train_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, check
from llamahome.data.checks.findings import Found
from llamahome.data.prepare import prepare
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.rendered import turn_mark
from llamahome.data.rows.row_error import RowError
from llamahome.data.text.render import render
from llamahome.data.text.tokens import ChatTokenizer

CHAT = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n"
TOKENIZER = ChatTokenizer(train_tokenizer())


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        (CHAT, "<|im_start|>"),
        ("<s>[INST] What? [/INST] That. </s>", "[INST]"),
        ("<bos><start_of_turn>user\nWhat?<end_of_turn>", "<start_of_turn>"),
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat?", "<|start_header_id|>"),
        ("<|user|>\nWhat?<|end|>", "<|user|>"),
        ("<|start|>user<|message|>What?", "<|start|>"),
        ("<｜begin▁of▁sentence｜><｜User｜>What?", "<｜User｜>"),
        ("ChatML begins a turn with <|im_start|>user.", None),
        ("<|im_start|> is a token.", None),
        ("[1] a note", None),
        ("<s>plain</s>", None),
    ],
)
def test_a_rendered_chat_is_told_from_a_text_about_one(text: str, mark: str | None) -> None:
    assert turn_mark(text) == mark


@pytest.mark.parametrize("text", ["That.<|im_end|>", "That.<|im_end|>\n", CHAT, f"{CHAT}  "])
def test_a_text_that_has_its_end_gets_no_second_one(text: str) -> None:
    assert render(Conversation(Row(0, "a", 1, {}), text=text), TOKENIZER, train_on="assistant").after == ()


def test_a_rendered_question_is_refused_without_advice_to_change_its_marks() -> None:
    turns = ({"role": "user", "content": CHAT}, {"role": "assistant", "content": "That."})
    with pytest.raises(RowError) as caught:
        render(Conversation(Row(0, "a", 1, {}), turns), TOKENIZER, train_on="assistant")
    assert caught.value.code == "data.rendered-chat" and "< |" not in str(caught.value.hint)


def test_training_and_the_check_tell_of_rendered_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{CHAT}{number}"}) + "\n" for number in range(4)))
    said: list[str] = []
    prepare(DataConfig(streaming=False), str(path), TOKENIZER, processed=tmp_path / "p", say=said.append).close()
    assert any("4 of 4 rows from everywhere are chats that were rendered already" in line for line in said)
    found: list[Found] = []
    check(Request((str(path),), DataConfig()), found.append)
    assert {each.problem.code for each in found} == {"data.rendered-chat"}


def test_a_turn_that_only_calls_a_tool_is_no_empty_answer(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    found: list[Found] = []
    check(Request((str(tmp_path / "rows.jsonl"),), DataConfig(), tokenizer=None), found.append)
    assert found == []
    (tmp_path / "words.csv").write_text("question,answer\nWhat?,nan\nWho?,<NA>\nWhen?,#N/A\nWhere?,None\nWhy?,null\n")
    check(Request((str(tmp_path / "words.csv"),), DataConfig(), tokenizer=None), found.append)
    assert [(each.problem.code, each.place.line if each.place else 0) for each in found] == [
        ("data.boilerplate-answer", n) for n in (2, 3, 4)
    ]
