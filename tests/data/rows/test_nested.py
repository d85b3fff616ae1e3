"""Rows within objects, and rows that are single messages: refused with a command that makes rows, which then are read."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from llamahome.data.files.sources import open_source
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(4)]
MESSAGES = [
    {"conversation_id": number // 2, "role": ("user", "assistant")[number % 2], "content": f"message {number}"} for number in range(8)
]
SERVED = {"features": [{"name": "prompt"}], "rows": [{"row_idx": number, "row": row} for number, row in enumerate(ROWS)]}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "nested.jsonl": lines([{"id": number, "data": row} for number, row in enumerate(ROWS)]),
    "array.json": json.dumps([{"row": row} for row in ROWS]),
    "served.json": json.dumps(SERVED),
    "conversation.json": json.dumps(
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "answer 0"}]}, indent=1
    ),
    "translation.jsonl": lines([{"id": number, "data": row} for number, row in enumerate(ROWS)]),
    "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}),
    "keyed.json": json.dumps({f"x{number}": row for number, row in enumerate(ROWS)}, indent=1),
    "messages.jsonl": lines(MESSAGES),
    "messages.csv": "conversation_id,role,content\n"
    + "".join(f"{one['conversation_id']},{one['role']},{one['content']}\n" for one in MESSAGES),
}


def first_problem(name: str) -> Problem:
    with pytest.raises(DataError) as caught:
        source = open_source(name)
        detect([source.row(number) for number in range(len(source))], "auto")
    return caught.value.problems[0]


@pytest.mark.parametrize("name", FILES)
def test_the_help_makes_rows_of_what_lies_within_objects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(FILES[name])
    hint = str(first_problem(name).hint)
    if hint.startswith("jq") and which("jq") is None:
        pytest.skip("needs jq")
    subprocess.run(hint.replace("python3", shlex.quote(sys.executable), 1), shell=True, check=True)
    made = next(path for path in tmp_path.iterdir() if path.name not in (name, "data"))
    source = open_source(made.name)
    rows = [source.row(number) for number in range(len(source))]
    read = [understand(row, detect(rows, "auto").name) for row in rows]
    answers = [one.turns[-1]["content"] for one in read if isinstance(one, Conversation)]
    wanted = answers[:1] if name == "conversation.json" else [f"answer {number}" for number in range(4)]
    assert answers == ([f"message {number}" for number in (1, 3, 5, 7)] if "messages" in name else wanted) and answers


def hint_for(value: dict[str, Any], source: str = "mine.jsonl") -> str | None:
    with pytest.raises(DataError) as caught:
        detect([Row(0, source, 1, value)], "auto")
    return caught.value.problems[0].hint


def test_choices_and_metadata_are_not_taken_for_rows() -> None:
    choices = hint_for({"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "key": "B"})
    assert "choices" in str(choices) and "jq" not in str(choices)
    assert "jq" not in str(hint_for({"prompt": "What?", "meta": {"text": "about it"}}))


def test_of_two_lists_of_turns_none_is_named() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "conversation_a" not in str(hint_for({"conversation_a": turns, "conversation_b": turns, "winner": "model_b"}))


def test_rows_of_a_list_need_the_question_beside_it() -> None:
    hint = str(hint_for({"instruction": "Add.", "instances": [{"input": "2 2", "output": "4"}]}))
    assert hint.endswith("with instruction in each")


@pytest.mark.parametrize(
    "value",
    [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "What?"},
        {"role": "assistant", "content": "That."},
        {"from": "human", "value": "What?"},
    ],
)
def test_single_messages_are_not_learned_as_texts(value: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        detect([Row(0, "mine.jsonl", 1, value)], "auto")
    assert caught.value.problems[0].code == "data.single-messages"


@pytest.mark.parametrize("value", [{"text": "What?", "author": "Jane Austen"}, {"text": "Hi.", "from": "ann@example.org"}])
def test_texts_with_an_author_stay_texts(value: dict[str, Any]) -> None:
    assert detect([Row(0, "mine.jsonl", 1, value)], "auto").name == "text"


def test_a_folder_of_one_conversation_a_file_is_joined_by_the_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats").mkdir()
    for number in range(3):
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"answer {number}"}]
        Path(f"chats/{number}.json").write_text(json.dumps({"messages": turns}, indent=1))
    hint = str(first_problem("chats").hint)
    if which("jq") is None:
        pytest.skip("needs jq")
    subprocess.run(hint, shell=True, check=True)
    assert len(open_source("chats.jsonl")) == 3


def test_the_help_of_a_tool_definition_shows_a_definition() -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    refused = understand(Row(0, "mine.jsonl", 1, {"messages": turns, "tools": [{"parameters": {}}]}), "messages")
    assert isinstance(refused, Problem) and '"parameters"' in str(refused.hint)
