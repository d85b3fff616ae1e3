"""Columns have the roles that their usual names say, in any case; unclear ones are refused, and no hint trains the wrong column."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.config.load import load_config
from llamahome.data.records import Conversation, Row
from llamahome.data.rows import column_roles
from llamahome.data.rows.column_roles import ColumnRoles, find_roles, plain_name
from llamahome.data.rows.detect import DetectedFormat, detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem

Q, C, A, S = "What is it?", "It is red.", "Red.", "Be brief."
ASKED = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]


def row_of(value: dict[str, Any]) -> Row:
    return Row(0, "mine.jsonl", 1, value)


def read(value: dict[str, Any], names: dict[str, str] | None = None) -> tuple[DetectedFormat, Conversation]:
    detected = detect([row_of(value)] * 3, "auto", names or {})
    conversation = understand(row_of(value), detected.name, names or {})
    assert isinstance(conversation, Conversation), conversation
    return detected, conversation


def said(conversation: Conversation) -> list[str]:
    return [turn.get("content") or json.dumps(turn["tool_calls"]) for turn in conversation.turns]


def refused(value: dict[str, Any]) -> Problem:
    with pytest.raises(DataError) as caught:
        detect([row_of(value)] * 3, "auto")
    return caught.value.problems[0]


READ: list[tuple[dict[str, Any], list[str]]] = [
    ({"instruction": Q, "context": C, "response": A, "category": "x"}, [f"{Q}\n\n{C}", A]),
    ({"instruction": Q, "context": " ", "response": A}, [Q, A]),
    ({"instruction": Q, "context": None, "output": A}, [Q, A]),
    ({"instruction": Q, "context": C, "output": A}, [f"{Q}\n\n{C}", A]),
    ({"instruction": Q, "input": C, "response": A}, [f"{Q}\n\n{C}", A]),
    ({"system_prompt": S, "instruction": Q, "output": A}, [S, Q, A]),
    ({"id": 1, "context": C, "question": Q, "answers": {"text": [A, "red"], "answer_start": [0, 1]}}, [f"{Q}\n\n{C}", A]),
    ({"question": Q, "answers": [A, "red"]}, [Q, A]),
    ({"question": Q, "answer": {"value": A, "aliases": ["red"]}}, [Q, A]),
    ({"system_prompt": S, "question": Q, "response": A}, [S, Q, A]),
    ({"system_prompt": "", "question": Q, "response": A}, [Q, A]),
    ({"problem": Q, "solution": A}, [Q, A]),
    ({"input": Q, "target": A}, [Q, A]),
    ({"source": Q, "target": A}, [Q, A]),
    ({"question": Q, "answer": A, "source": "a book"}, [Q, A]),
    ({"prompt": Q, "chosen": A}, [Q, A]),
    ({"prompt": Q, "chosen": ASKED}, [Q, A]),
    ({"prompt": Q, "chosen": ASKED[1:]}, [Q, A]),
    ({"prompt": ASKED[:1], "response": A}, [Q, A]),
    ({"prompt": f"{C} {Q}", "context": C, "completion": A}, [f"{C} {Q}", A]),
    ({"Question": Q, "ANSWER": A}, [Q, A]),
    ({"System Prompt": S, "userPrompt": Q, "model-response": A}, [S, Q, A]),
    ({"question": Q, "answer": A, "text": f"{Q} {A}"}, [Q, A]),
    ({"data": [Q, A], "id": "0"}, [Q, A]),
    ({"dialogue": json.dumps([Q, A])}, [Q, A]),
    ({"conversation": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, [Q, A]),
    ({"dialog": [{"speaker": "User", "text": Q}, {"speaker": "Assistant", "text": A}]}, [Q, A]),
    ({"Messages": ASKED}, [Q, A]),
    ({"conversation": [{"human": Q, "assistant": A}, {"human": C, "assistant": S}]}, [Q, A, C, S]),
    ({"inputs": Q, "targets": A, "task": "colours"}, [Q, A]),
    ({"messages": [{"role": "user", "text": Q}, {"role": "assistant", "text": A}]}, [Q, A]),
    ({"messages": {"role": ["user", "assistant"], "content": [Q, A]}}, [Q, A]),
    ({"conversations": {"from": ["human", "gpt"], "value": [Q, A]}, "id": "1"}, [Q, A]),
    ({"conversations": [{"role": "human", "content": Q}, {"role": "gpt", "content": A}]}, [Q, A]),
]


@pytest.mark.parametrize(("value", "texts"), READ)
def test_rows_are_read_as_their_names_say(value: dict[str, Any], texts: list[str]) -> None:
    detected, conversation = read(value)
    assert said(conversation) == texts
    for key in value.keys() & {"id", "category", "text"}:
        assert key in detected.reason.partition("not read: ")[2]


def test_the_reason_says_which_column_has_which_role() -> None:
    detected, _ = read({"instruction": Q, "context": C, "response": A, "category": "x"})
    assert detected.reason == "every row has `instruction` and `context` (the prompt) and `response` (learned); not read: category"
    detected, _ = read({"system_prompt": S, "question": Q, "answers": [A]})
    columns = "`system_prompt` (the system text), `question` (the prompt) and the first of `answers` (learned)"
    assert detected.reason == f"every row has {columns}"


def test_labels_beside_a_text_are_reported_as_not_read() -> None:
    for label, written in ((1, '"{label}"'), ("good", "label")):
        detected = detect([row_of({"text": Q, "label": label})], "auto")
        assert detected.name == "text" and "not read: label" in detected.reason
        assert f"--set 'data.columns={{prompt: text, completion: {written}}}'" in detected.reason
        names = load_config(assignments=[f"data.columns={{prompt: text, completion: {written}}}"]).config.data.columns
        assert said(read({"text": Q, "label": label}, names)[1]) == [Q, str(label)]


UNCLEAR: list[dict[str, Any]] = [
    {"problem": Q, "solution": A, "answer": "red"},
    {"instruction": "Answer.", "question": Q, "answer": A},
    {"question": Q, "choices": ["red", "blue"], "answer": 0},
    {"article": C, "question": Q, "options": "red, blue", "answer": A},
    {"text": "The ball is blue.", "question": Q, "answer": A},
    {"text": "The ball is blue.", "instruction": "Be short.", "summary": A},
]


@pytest.mark.parametrize("value", UNCLEAR)
def test_unclear_columns_are_refused(value: dict[str, Any]) -> None:
    assert refused(value).code == "data.unclear-columns"


def test_pairs_under_data_are_rows_not_a_chat() -> None:
    problem = refused({"data": [{"question": Q, "answer": A}] * 2})
    assert problem.code == "data.unknown-format" and 'are in the list "data"' in str(problem.hint)


HELPED: list[tuple[dict[str, Any], list[str] | None]] = [
    ({"instruction": "Answer.", "question": Q, "answer": A}, [f"Answer.\n\n{Q}", A]),
    ({"text": "The ball is blue.", "question": Q, "answer": A}, [f"{Q}\n\nThe ball is blue.", A]),
    ({"promt": Q, "completion": A}, [Q, A]),
    ({"qestion": Q, "my respons": A, "respone": A}, [Q, A]),
    ({"prompt": Q, "chosen": A, "rejected": "Blue."}, [Q, A]),
    ({"question": Q, "context": C, "chosen": A, "rejected": "Blue."}, [f"{Q}\n\n{C}", A]),
    ({"prompt": Q, "chosen": ASKED, "rejected": ASKED}, [Q, A]),
    ({"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": ASKED[1:]}, [Q, A]),
    ({"exchange": ASKED}, [Q, A]),
    ({"problem": Q, "solution": A, "answer": "red"}, None),
    ({"english": Q, "french": A}, None),
    ({"prompt": Q, "code": A}, None),
    ({"tweet": Q, "label": 0}, None),
    ({"prompt_id": Q, "completion": A}, None),
    ({"chosen": Q, "rejected": A}, None),
    ({"story": C, "questions": [Q], "answers": {"input_text": [A]}}, None),
]


@pytest.mark.parametrize(("value", "texts"), HELPED)
def test_a_hint_reads_the_rows_correctly_or_cannot_be_typed_as_it_is(value: dict[str, Any], texts: list[str] | None) -> None:
    hint = refused(value).hint
    if texts is None:
        assert hint is None or "COLUMN" in hint
        if hint is not None:
            with pytest.raises(DataError, match=r'no row has the key "COLUMN"'):
                detect([row_of(value)], "auto", typed(hint))
        return
    assert hint is not None and said(read(value, typed(hint))[1]) == texts


def typed(hint: str) -> dict[str, str]:
    """What a shell and the settings make of the help line."""
    flag, assignment = shlex.split(hint.removeprefix("--set training.objective=dpo   learns from both answers; ").split("   ")[0])
    assert flag == "--set"
    return load_config(assignments=[assignment]).config.data.columns


ANSWERS = {*column_roles.COMPLETION, *column_roles.DERIVED, *column_roles.ABSTRACT, "rejected"}
some_names = st.sampled_from(
    sorted(
        {
            *column_roles.PROMPT,
            *column_roles.CONTEXT,
            *column_roles.COMPLETION,
            *column_roles.SYSTEM,
            *column_roles.TEXTS,
            *column_roles.DERIVED,
            *column_roles.ABSTRACT,
            "text",
            "label",
            "title",
            "summary",
            "context_id",
            "answers_raw",
        }
    )
)


@settings(deadline=None, max_examples=300)
@given(st.lists(some_names, min_size=1, max_size=5, unique=True), st.booleans())
def test_the_learned_column_always_has_the_name_of_an_answer(names: list[str], loud: bool) -> None:
    value = {name.upper() if loud else name: f"The {name}." for name in names}
    try:
        detected, columns = detect([row_of(value)], "auto"), {}
    except DataError as error:
        hint = error.problems[0].hint
        if hint is None or "COLUMN" in hint or not hint.startswith("--set"):
            return
        columns = typed(hint)
        detected = detect([row_of(value)], "auto", columns)
    conversation = understand(row_of(value), detected.name, columns)
    assert isinstance(conversation, Conversation), conversation
    learned = conversation.text or conversation.turns[-1]["content"]
    name = re.sub(r"^The |\.$", "", learned)
    assert name in ANSWERS if conversation.turns else name == "text" or len(value) == 1


@given(st.sampled_from(sorted({*column_roles.PROMPT, *column_roles.COMPLETION, *column_roles.SYSTEM})))
def test_spellings_of_one_name_are_the_same_name(name: str) -> None:
    words = name.split("_")
    camel = words[0] + "".join(word.capitalize() for word in words[1:])
    assert {plain_name(way) for way in (name, name.upper(), camel, " ".join(words).title(), "-".join(words))} == {name}


def test_a_column_that_the_settings_name_is_not_read_twice() -> None:
    value = {"question": Q, "context": C, "answer": A, "system_prompt": S}
    assert said(read(value, {"prompt": "question", "completion": "answer"})[1]) == [Q, A]
    assert said(read(value, {"prompt": "question"})[1]) == [Q, A]
    assert said(read(value, {"completion": "answer"})[1])[-2:] == [f"{Q}\n\n{C}", A]
    parts = find_roles(value, given={"prompt": "context"})
    assert isinstance(parts, ColumnRoles) and (parts.prompt, parts.completion, parts.context) == ("context", "answer", ())


@pytest.mark.parametrize(
    "value",
    [
        {"prompt#completion": "a#b"},
        {"prompt completion": "a b"},
        {"prompt\x1fcompletion": "a\x1fb"},
        {"exchange": "[{'role': 'user', 'content': 'a'}]"},
        {"messages": "[{'role': 'user', 'content': 'a'}]"},
        {"blocks": [{"role": "user", "segments": [{"text": "a"}]}]},
    ],
)
def test_no_hint_learns_a_line_of_a_table_or_a_list_in_text(value: dict[str, Any]) -> None:
    hint = str(refused(value).hint)
    assert "text:" not in hint and "messages:" not in hint


@pytest.mark.parametrize("key", ["body", "Full Text", "story-text", "text (clean)"])
def test_a_single_column_of_texts_is_suggested_as_text(key: str) -> None:
    hint = str(refused({key: "Once upon a time."}).hint)
    (option,) = shlex.split(hint)[1:]
    assert load_config(assignments=[option]).config.data.columns == {"text": key}


def test_the_hint_learns_a_true_or_false_answer_as_text() -> None:
    problem = understand(row_of({"question": Q, "answer": True}), "prompt_completion", {})
    assert isinstance(problem, Problem) and 'completion: "{answer}"' in str(problem.hint)
    assert said(read({"question": Q, "answer": True}, {"completion": "{answer}"})[1]) == [Q, "true"]


def test_the_command_that_keeps_the_good_answers_makes_rows_that_are_no_longer_refused(tmp_path: Path) -> None:
    place = tmp_path / "my good.jsonl"
    rows = [{"prompt": Q, "completion": A, "label": good} for good in (True, False, True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    place.write_text(text)
    with pytest.raises(DataError) as caught:
        detect([Row(0, str(place), 1, rows[0])], "auto")
    command = next(way for way in re.split("   |; ", str(caught.value.problems[0].hint)) if "del(.label)" in way)
    assert str(place.with_name("my good-good.jsonl")) in command
    if shutil.which("jq"):
        subprocess.run(command, shell=True, check=True)
        kept = [json.loads(line) for line in place.with_name("my good-good.jsonl").read_text().splitlines()]
        assert kept == [{"prompt": Q, "completion": A}] * 2 and detect([row_of(kept[0])], "auto").name == "prompt_completion"
    assert place.read_text() == text


@pytest.mark.parametrize("answers", [["Red.", "It is."], {"text": ["Red."], "answer_start": [3]}])
def test_answers_that_a_table_holds_as_json_are_read_as_the_list_is(answers: Any) -> None:
    for cell in (answers, json.dumps(answers)):
        detected, conversation = read({"question": Q, "answers": cell})
        assert said(conversation) == [Q, "Red."] and "the first of `answers`" in detected.reason


@pytest.mark.parametrize("answers", ["['Red.', 'It is.']", "{'text': ['Red.'], 'answer_start': array([3], dtype=int32)}", "['Red.']"])
def test_answers_in_python_notation_are_refused(answers: str) -> None:
    problem = understand(row_of({"question": Q, "answers": answers}), "prompt_completion", {})
    assert isinstance(problem, Problem) and problem.code == "data.wrong-type" and "Python" in problem.message


@pytest.mark.parametrize("answer", ['["a", "b"]', '{"text": ["a"]}', "['a']"])
@pytest.mark.parametrize("key", ["output", "answer", "completion", "response"])
def test_json_that_is_the_answer_itself_is_learned_as_it_is(key: str, answer: str) -> None:
    assert said(read({"prompt": Q, key: answer})[1]) == [Q, answer]


def test_answers_in_prose_are_learned_whatever_they_begin_with() -> None:
    for answer in ("[1] says so.", "{x} is a set.", "['tis] so", "Both."):
        assert said(read({"question": Q, "answers": answer})[1]) == [Q, answer]
