"""An answer in a column beside the turns that ask for it is never passed over in silence, and the help reads both."""

import shlex
from typing import Any

import pytest

from llamahome.config.yamltext import read_value
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem

ASKED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
WANTED = [("user", "2+2?"), ("assistant", "4"), ("user", "Sure?"), ("assistant", "Yes.")]


def row_of(value: dict[str, Any]) -> Row:
    return Row(index=0, source="mine.jsonl", line=1, value=value)


def problem_of(row: Row) -> Problem:
    try:
        read = understand(row, detect([row], "auto").name)
    except DataError as error:
        return error.problems[0]
    assert isinstance(read, Problem)
    return read


@pytest.mark.parametrize("turns", ["messages", "context", "exchange", "prompt"])
@pytest.mark.parametrize("answer", ["response", "completion", "Response", "output"])
@pytest.mark.parametrize("system", [None, "system_prompt"])
def test_the_help_reads_the_turns_and_the_answer_beside_them(turns: str, answer: str, system: str | None) -> None:
    row = row_of({"id": "7", turns: ASKED, answer: "Yes.", **({system: "Be brief."} if system else {})})
    if turns == "prompt" and answer != "completion":  # as these names say
        read = understand(row, detect([row], "auto").name)
        assert isinstance(read, Conversation) and read.context_only == {1 + bool(system)}
        return
    hint = shlex.split(str(problem_of(row).hint).partition("   ")[0])
    names = read_value(hint[-1].removeprefix("data.columns="))
    assert isinstance(names, dict)
    read = understand(row, detect([row], "auto", names).name, names)
    assert isinstance(read, Conversation)
    expected = [*([("system", "Be brief.")] if system else []), *WANTED]
    assert [(turn["role"], turn["content"]) for turn in read.turns] == expected and read.context_only == {1 + bool(system)}


@pytest.mark.parametrize("beside", [{"response": ""}, {"response": None}, {"note": "Yes."}, {"response": "Yes.", "answer": "No."}])
def test_turns_that_end_with_a_question_are_read_if_no_column_is_surely_its_answer(beside: dict[str, Any]) -> None:
    row = row_of({"messages": ASKED, **beside})
    assert isinstance(understand(row, detect([row], "auto").name), Conversation)
    kept = understand(row_of({"messages": ASKED, "response": "Yes."}), "messages", {"messages": "messages"})
    assert isinstance(kept, Conversation) and len(kept.turns) == 3


def test_an_object_in_the_place_of_a_text_is_refused_with_the_paths_that_read_it() -> None:
    row = row_of({"request": {"messages": ASKED}, "response": {"choices": [{"index": 0, "message": {"content": "Yes."}}]}})
    assert "request.messages.0.content" in str(problem_of(row).hint)
    names = {"prompt": "request.messages", "completion": "response.choices.0.message.content"}
    read = understand(row, detect([row], "auto", names).name, names)
    assert isinstance(read, Conversation) and [(turn["role"], turn["content"]) for turn in read.turns] == WANTED
