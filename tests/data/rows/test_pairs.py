"""An article and its summary, or a passage and its answer, are a question and its answer; a text alone stays a text."""

from typing import Any

import pytest
from tests.data.rows.test_column_roles import A, C, Q, read, said

from llamahome.data.rows.column_roles import ColumnRoles, find_roles

CALL = '[{"name": "clock", "arguments": {"zone": "UTC"}}]'

PAIRS: list[tuple[dict[str, Any], list[str]]] = [
    ({"Context": Q, "Response": A}, [Q, A]),
    ({"passage": C, "answer": A, "title": "x", "passage_id": "7"}, [C, A]),
    ({"text": C, "summary": A}, [C, A]),
    ({"text": C, "summary": A, "title": "x", "source": "y"}, [C, A]),
    ({"text": C, "label": "x", "translation": A}, [C, A]),
    ({"Article": C, "HIGHLIGHTS": A, "id": "1"}, [C, A]),
    ({"documentText": C, "summaryText": A}, [C, A]),
    ({"Dialogues": C, "Summaries": A}, [C, A]),
    ({"article": C, "abstract": A}, [C, A]),
    ({"instruction": Q, "document": C, "summary": A}, [f"{Q}\n\n{C}", A]),
    ({"sources": C, "targets": A}, [C, A]),
]


@pytest.mark.parametrize(("value", "texts"), PAIRS)
def test_pairs_are_read_as_their_names_say_with_the_reason(value: dict[str, Any], texts: list[str]) -> None:
    found, conversation = read(value)
    assert said(conversation) == texts
    learned = next(key for key in value if value[key] == A)
    assert found.name == "prompt_completion" and f"`{learned}` (learned)" in found.reason
    assert all(key in found.reason for key in value)


@pytest.mark.parametrize("beside", [{"abstract": A}, {"title": A}, {"document": C, "summary": A}, {"summary": 3}, {"answer": A}, {}])
def test_a_text_without_a_derived_answer_is_plain_text(beside: dict[str, Any]) -> None:
    found, conversation = read({"text": C, **beside})
    assert conversation.text == C and all(key in found.reason for key in beside)


@pytest.mark.parametrize("beside", [{"qestion": Q}, {"questions": [Q]}, {"text": Q}])
def test_a_passage_is_not_the_question_if_another_column_may_be(beside: dict[str, Any]) -> None:
    assert not isinstance(find_roles({"context": C, "answer": A, **beside}), ColumnRoles)


def test_tool_calls_in_a_column_are_calls() -> None:
    definitions = '[{"name": "clock", "parameters": {"type": "object"}}]'
    for key in ("answers", "response"):
        _, conversation = read({"id": 1, "query": Q, key: CALL, "tools": definitions})
        assert conversation.turns[-1]["tool_calls"][0]["function"] == {"name": "clock", "arguments": {"zone": "UTC"}}
    assert said(read({"query": Q, "response": CALL})[1]) == [Q, CALL], "without tools it is a text"
    turns = [{"from": "human", "value": Q}, {"from": "tool_call", "value": CALL}, {"from": "tool_response", "value": "12"}]
    _, conversation = read({"conversations": [*turns, {"from": "gpt", "value": A}], "tools": definitions})
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant", "tool", "assistant"]
