"""The format is found with its reason or refused with a hint, also if the columns have other names."""

from typing import Any

import pytest

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem

ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


def row_of(value: dict[str, Any], line: int = 5) -> Row:
    return Row(line - 1, "mine.jsonl", line, value)


def detect_fails(*values: dict[str, Any]) -> Problem:
    with pytest.raises(DataError) as caught:
        detect([row_of(value, line) for line, value in enumerate(values, start=1)], "auto")
    return caught.value.problems[0]


def test_mixed_formats_are_reported_with_lines() -> None:
    problem = detect_fails({"messages": ASKED}, {"messages": ASKED}, {"instruction": "a", "output": "b"})
    assert problem.code == "data.mixed-formats"
    assert "mine.jsonl:1 is messages" in problem.message and "mine.jsonl:3 is alpaca" in problem.message


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "{prompt: prompt, completion: chosen}"),
        ({"prompt": "a", "chosen": ASKED, "rejected": ASKED}, "{messages: chosen}"),
        ({"conversations": ASKED, "chosen": "b", "rejected": "c"}, ""),
        ({"prompt": "a", "chosen_response": "b", "rejected_response": "c"}, "{prompt: prompt, completion: chosen_response}"),
        ({"prompt": "a", "completion": "b", "label": False}, "select(.label) | del(.label)"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, ""),
    ],
)
def test_preference_data_is_refused_with_a_hint(value: dict[str, Any], hint: str) -> None:
    problem = detect_fails(value)
    assert problem.code == "data.preference" and "only good answers are learned" in problem.message
    assert hint in str(problem.hint) if hint else problem.hint is None


def test_unknown_keys_are_answered_with_the_nearest_known() -> None:
    problem = detect_fails({"promt": "a", "completion": "b"})
    assert problem.code == "data.unknown-format" and problem.hint == "--set 'data.columns={prompt: promt, completion: completion}'"
    assert detect_fails({}).code == "data.unknown-format"


def test_other_formats_of_the_rows_are_mentioned() -> None:
    reason = detect([row_of({"messages": ASKED, "text": "rendered"})], "auto").reason
    assert "--set data.format=text" in reason
    assert "2 of the first 3 rows" in detect([row_of(v) for v in ({"messages": ASKED}, {"odd": 1}, {"messages": ASKED})], "auto").reason


MAPPED: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("messages", {"messages": "dialogue"}, {"dialogue": ASKED, "text": "other"}),
    ("sharegpt", {"conversations": "dialogue"}, {"dialogue": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}),
    ("alpaca", {"instruction": "q", "output": "a"}, {"q": "What?", "a": "That.", "messages": "not these"}),
    ("prompt_completion", {"prompt": "question", "completion": "answer"}, {"question": "What?", "answer": "That.", "text": "x"}),
    ("prompt_completion", {"prompt": "question"}, {"question": "What?", "completion": "That.", "prompt": "not this"}),
    ("prompt_completion", {"prompt": "question", "completion": "answer"}, {"question": "What?", "answer": "That.", "messages": ASKED}),
    ("text", {"text": "body"}, {"body": "What? That.", "title": "x"}),
]


@pytest.mark.parametrize(("name", "names", "value"), MAPPED)
def test_columns_of_other_names_are_read(name: str, names: dict[str, str], value: dict[str, Any]) -> None:
    found = detect([row_of(value)], "auto", names)
    assert found.name == name and next(iter(names.values())) in found.reason
    read = understand(row_of(value), name, names)
    assert isinstance(read, Conversation), read
    assert read.text == "What? That." if name == "text" else list(read.turns) == ASKED


def test_an_error_names_the_key_that_the_row_has() -> None:
    names = {"prompt": "question", "completion": "answer"}
    wrong = understand(row_of({"question": "a", "answer": 7}), "prompt_completion", names)
    missing = understand(row_of({"question": "a", "anser": "b"}), "prompt_completion", names)
    turn = understand(row_of({"dialogue": [{"role": "user"}]}), "messages", {"messages": "dialogue"})
    assert isinstance(wrong, Problem) and "answer is a number" in wrong.message
    assert isinstance(missing, Problem) and missing.hint == 'rename "anser" to "answer"'
    assert isinstance(turn, Problem) and turn.message.startswith('dialogue[0] has no "content"')


def test_a_column_that_is_missing_or_not_read_is_refused() -> None:
    row = row_of({"question": "a", "answer": "b"})
    with pytest.raises(DataError) as caught:
        detect([row], "auto", {"prompt": "qestion", "completion": "answer", "tools": "gone"})
    near, gone = caught.value.problems
    assert near.code == gone.code == "data.unknown-column" and near.hint == "--set 'data.columns={prompt: question, completion: answer}'"
    assert "question, answer" in str(gone.hint)
    with pytest.raises(DataError) as unread:
        detect([row_of({"messages": ASKED, "q": "a"})], "messages", {"prompt": "q"})
    assert unread.value.problems[0].code == "data.unread-column" and "data.columns.prompt" in unread.value.problems[0].message
