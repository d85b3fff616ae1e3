"""What a row has beside its question or turns reaches the model: system texts under any name, prompts as JSON text, and no nan."""

import json
from typing import Any

import pytest

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import Problem

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Count."}


def read(value: dict[str, Any]) -> tuple[str, Conversation | Problem]:
    row = Row(0, "mine.jsonl", 1, value)
    detected = detect([row], "auto")
    return detected.reason, understand(row, detected.name)


def turns(value: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    found = read(value)[1]
    assert isinstance(found, Conversation), found
    return found.turns


@pytest.mark.parametrize(
    "system",
    [
        {"system_prompt": "Count."},
        {"systemInstruction": {"role": "system", "parts": [{"text": "Count."}]}},
        {"System Message": "Count."},
        {"system": "Count.", "system_prompt": None},
    ],
)
def test_a_system_text_beside_turns_is_read_under_any_name(system: dict[str, Any]) -> None:
    assert turns({**system, "messages": [USER, ANSWER]}) == (SYSTEM, USER, ANSWER)
    sharegpt = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    assert turns({**system, "conversations": sharegpt}) == (SYSTEM, USER, ANSWER)
    assert "not read" not in read({**system, "messages": [USER, ANSWER]})[0] or "system" in system


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        {"prompt": json.dumps([USER]), "response": "4"},
        {"input": json.dumps([USER]), "output": "4"},
    ],
)
def test_a_prompt_of_turns_may_be_json_text_as_tables_write_it(value: dict[str, Any]) -> None:
    assert turns(value) == (USER, ANSWER)


def test_a_whole_conversation_in_json_is_a_text_to_read() -> None:
    text = json.dumps([USER, ANSWER])
    assert turns({"input": text, "output": "polite"})[0] == {"role": "user", "content": text}


def test_a_prompt_in_pythons_notation_is_refused() -> None:
    found = read({"prompt": str([USER]), "response": "4"})[1]
    assert isinstance(found, Problem) and found.code == "data.wrong-type" and "Python's notation" in found.message


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", "null", "<NA>", "N/A", "<noinput>", " ", ""])
def test_what_programs_write_for_no_text_is_no_context(cell: str) -> None:
    assert turns({"instruction": "2+2?", "input": cell, "output": "4"}) == (USER, ANSWER)
    assert turns({"question": "2+2?", "context": cell, "answer": "4"}) == (USER, ANSWER)


@pytest.mark.parametrize("empty", [None, []])
def test_a_list_of_turns_is_found_beside_an_empty_one(empty: object) -> None:
    assert turns({"messages": empty, "conversations": [USER, ANSWER]}) == (USER, ANSWER)


def test_tools_that_are_null_in_json_text_are_no_tools() -> None:
    assert turns({"messages": [USER, ANSWER], "tools": "null"}) == (USER, ANSWER)


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"A": "a red", "B": "a blue"}, "{question}\\nA: {A}\\nB: {B}"),
        ({"opa": "red", "opb": "blue", "opc": "green"}, "{question}\\nopa: {opa}\\nopb: {opb}\\nopc: {opc}"),
        ({"option_1": "red", "option_2": "blue"}, "{question}\\noption_1: {option_1}\\noption_2: {option_2}"),
    ],
)
def test_a_question_beside_its_choices_is_refused_with_the_mapping_that_shows_them(columns: dict[str, str], prompt: str) -> None:
    from llamahome.errors import DataError

    with pytest.raises(DataError) as caught:
        read({"question": "Which?", **columns, "answer": "B"})
    problem = caught.value.problems[0]
    assert problem.code == "data.unclear-columns" and prompt in str(problem.hint)


def test_a_column_that_names_splits_is_told() -> None:
    assert "rows of every split are read" in read({"prompt": "2+2?", "completion": "4", "split": "train"})[0]
    assert "every split" not in read({"prompt": "2+2?", "completion": "4", "set": "sums"})[0]
