"""A row with NaN or an infinity, which JSON does not have, is read if they are not used, and refused if they are."""

import json
from pathlib import Path

import pytest

from llamahome.data.files.sources import open_source
from llamahome.data.records import Conversation
from llamahome.data.rows.formats import understand
from llamahome.errors import Problem

VALUES = ["NaN", "Infinity", "-Infinity"]
READ = [
    ("prompt_completion", '{"prompt": "a", "completion": %s}', "completion is %s"),
    ("alpaca", '{"instruction": "a", "input": %s, "output": "b"}', "input is %s"),
    ("text", '{"text": %s}', "text is %s"),
    ("messages", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": %s}]}', "messages[1].content is %s"),
    ("messages", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": %s}]}', "weight"),
]
CALL = '{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": %s}}}'


def understood(tmp_path: Path, line: str, name: str) -> Conversation | Problem:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    return understand(open_source(str(tmp_path / "a.jsonl")).row(0), name)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("shape", ['"score": %s', '"more": {"deep": [1, {"loss": %s}]}', '"score": 1, "other": [%s]'])
def test_a_row_is_read_if_nothing_uses_its_not_finite_numbers(tmp_path: Path, shape: str, value: str) -> None:
    line = '{"prompt": "a", "completion": "b", ' + shape % value + "}"
    found = understood(tmp_path, line, "prompt_completion")
    assert isinstance(found, Conversation) and found.turns[1]["content"] == "b"


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("name", "line", "words"), READ)
def test_a_row_is_refused_if_its_not_finite_numbers_are_used(tmp_path: Path, name: str, line: str, words: str, value: str) -> None:
    found = understood(tmp_path, line % value, name)
    assert isinstance(found, Problem)
    assert (words % value if "%s" in words else words) in found.message


@pytest.mark.parametrize("value", VALUES)
def test_an_argument_of_a_tool_call_is_read(tmp_path: Path, value: str) -> None:
    turns = '[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [%s]}]' % (CALL % value)
    found = understood(tmp_path, f'{{"messages": {turns}}}', "messages")
    assert isinstance(found, Problem) and found.code == "data.bad-json"


def test_broken_json_beside_not_finite_numbers_is_still_reported(tmp_path: Path) -> None:
    for line, code in (
        ('{"score": NaN, "prompt": "a" "b"}', "data.bad-json"),
        ('{"score": NaN, "prompt": "a", "prompt": "b"}', "data.repeated-key"),
        ('{"score": NaN, "prompt": "\\ud83d"}', "data.lone-surrogate"),
    ):
        (tmp_path / "a.jsonl").write_text(line + "\n" + json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        found = open_source(str(tmp_path / "a.jsonl")).parsed(0)
        assert isinstance(found, Problem) and found.code == code
