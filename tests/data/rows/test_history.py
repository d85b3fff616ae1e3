"""The history of a question, as pairs or as turns, is read before it, and nothing else is taken for a history."""

import json
from typing import Any

import pytest

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import DetectedFormat, detect
from llamahome.data.rows.formats import understand

Q, A = "What is it?", "Red."


def read(value: dict[str, Any], names: dict[str, str] | None = None) -> tuple[DetectedFormat, Conversation]:
    row = Row(0, "mine.jsonl", 1, value)
    found = detect([row] * 3, "auto", names or {})
    conversation = understand(row, found.name, names or {})
    assert isinstance(conversation, Conversation), conversation
    return found, conversation


def said(conversation: Conversation) -> list[str]:
    return [turn["content"] for turn in conversation.turns]


PAIRS = [["Who?", "He."]]


@pytest.mark.parametrize(
    "history",
    [
        PAIRS,
        json.dumps(PAIRS),
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}],
        [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "He."}],
    ],
)
@pytest.mark.parametrize(
    ("ask", "answer"), [("prompt", "response"), ("question", "answer"), ("prompt", "completion"), ("instruction", "output")]
)
def test_the_history_is_read_before_the_question(history: Any, ask: str, answer: str) -> None:
    found, conversation = read({ask: Q, answer: A, "history": history})
    assert said(conversation) == ["Who?", "He.", Q, A]
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 2
    assert "not read" not in found.reason


@pytest.mark.parametrize("history", ["He was asked before.", ["a", "b"], 7])
def test_a_history_without_turns_is_not_read_and_reported(history: Any) -> None:
    found, conversation = read({"prompt": Q, "response": A, "history": history})
    assert said(conversation) == [Q, A] and "not read: history" in found.reason


def test_data_columns_must_name_the_history_of_a_prompt_that_it_names() -> None:
    row = {"ask": Q, "say": A, "history": PAIRS}
    names = {"prompt": "ask", "completion": "say"}
    assert said(read(row, names)[1]) == [Q, A]
    assert said(read(row, names | {"history": "history"})[1]) == ["Who?", "He.", Q, A]


def test_an_empty_history_is_not_reported_as_unread() -> None:
    assert "not read" not in read({"prompt": Q, "response": A, "history": []})[0].reason
