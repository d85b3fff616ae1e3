"""Rows with a prompt and no answer: every spelling is read alike, answers are read where there are some, and the rest is refused."""

import json
from typing import Any

import pytest

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem

SYSTEM, USER = {"role": "system", "content": "Count."}, {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
SPELLINGS: list[dict[str, Any]] = [
    {"prompt": "2+2?"},
    {"prompt": [USER], "id": 7},
    {"prompt": json.dumps([USER])},
    {"prompt": USER},
    {"question": "2+2?", "ground_truth": 4},
    {"messages": [USER], "ground_truth": "4"},
    {"messages": json.dumps([USER])},
    {"conversations": [{"from": "human", "value": "2+2?"}]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]},
]


def row_of(value: dict[str, Any]) -> Row:
    return Row(index=4, source="mine.jsonl", line=5, value=value)


def read(value: dict[str, Any], names: dict[str, str] | None = None) -> Conversation | Problem:
    return understand(row_of(value), "prompts", names or {})


@pytest.mark.parametrize("value", SPELLINGS)
def test_every_spelling_of_a_prompt_is_the_same(value: dict[str, Any]) -> None:
    detected, found = detect([row_of(value)] * 3, "prompts"), read(value)
    assert detected.name == "prompts" and "every row has" in detected.reason and "no answer" in detected.reason
    assert isinstance(found, Conversation), found
    assert found.turns == (USER,) and not found.context_only and found.row.value is value


def test_what_stands_before_the_question_is_the_prompt_too() -> None:
    for value in ({"messages": [SYSTEM, USER, ANSWER, USER]}, {"system": "Count.", "prompt": [USER, ANSWER, USER]}):
        found = read(value)
        assert isinstance(found, Conversation), found
        assert found.turns == (SYSTEM, USER, ANSWER, USER) and found.context_only == {2}


def test_a_text_that_the_question_is_about_and_a_system_text_are_added() -> None:
    found = read({"system_prompt": "Count.", "question": "How many?", "context": "Two apples."})
    assert isinstance(found, Conversation), found
    assert [turn["content"] for turn in found.turns] == ["Count.", "How many?\n\nTwo apples."]


def test_columns_of_other_names_and_templates_are_read_where_the_setting_names_them() -> None:
    for names in ({"prompt": "ask"}, {"prompt": "{ask}"}, {"prompt": "of.text"}):
        value = {"ask": "2+2?", "of": {"text": "2+2?"}}
        assert detect([row_of(value)], "prompts", names).name == "prompts"
        found = read(value, names)
        assert isinstance(found, Conversation) and found.turns == (USER,), found


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"prompt": "2+2?", "completion": "4"}, "prompt_completion"),
        ({"prompt": [USER], "answer": "4"}, "prompt_completion"),
        ({"instruction": "2+2?", "output": "4"}, "alpaca"),
        ({"text": "2+2 is 4"}, "text"),
    ],
)
def test_rows_with_answers_are_read_as_in_any_other_run(value: dict[str, Any], name: str) -> None:
    assert detect([row_of(value)], "prompts").name == name
    if name != "text":
        assert detect([row_of({"prompt": "2+2?"}), row_of(value)], "prompts").name == name


def test_an_answer_among_prompts_is_read_as_the_reference() -> None:
    for value in ({"messages": [USER, ANSWER]}, {"prompt": "2+2?", "completion": "4"}):
        found = read(value)
        assert isinstance(found, Conversation) and found.turns == (USER, ANSWER), found


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"prompt": ""}, "data.empty-content"),
        ({"messages": []}, "data.no-turns"),
        ({"messages": [{"role": "users", "content": "2+2?"}]}, "data.unknown-role"),
        ({"prompt": [SYSTEM]}, "data.missing-key"),
        ({"number": 4}, "data.missing-key"),
    ],
)
def test_a_row_with_neither_a_prompt_nor_an_answer_is_refused(value: dict[str, Any], code: str) -> None:
    found = read(value)
    assert isinstance(found, Problem) and found.code == code, found


def test_rows_without_a_prompt_are_refused_as_in_any_other_run() -> None:
    for value in ({"number": 4}, {"a": "b", "c": "d"}):
        with pytest.raises(DataError) as refused:
            detect([row_of(value)], "prompts")
        assert refused.value.problems[0].code == "data.unknown-format"


def test_where_answers_are_learned_prompts_alone_are_called_that_and_not_rows_of_no_format() -> None:
    with pytest.raises(DataError) as refused:
        detect([row_of({"prompt": "2+2?"})], "auto")
    [problem] = refused.value.problems
    told = "every row has `prompt` and no answer, and only training.objective grpo learns without one"
    assert problem.message == f'{told}; the keys here are "prompt"'
    assert problem.code == "data.unknown-format" and problem.hint and "completion: COLUMN" in problem.hint


def test_where_answers_are_learned_a_list_of_turns_without_one_is_refused_with_what_learns_from_it() -> None:
    with pytest.raises(DataError) as refused:
        detect([row_of({"prompt": [USER]})], "auto")
    hint = refused.value.problems[0].hint or ""
    assert hint.startswith("--set training.objective=grpo --reward "), hint
