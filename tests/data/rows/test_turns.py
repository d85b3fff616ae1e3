"""Turns beyond plain text: tool calls in every spelling, their results, reasoning, weights, and a system text beside the turns."""

import json
from typing import Any

import pytest

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import Problem

ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


def row_of(value: dict[str, Any], line: int = 5) -> Row:
    return Row(line - 1, "mine.jsonl", line, value)


def calling(calls: object, content: object = None) -> dict[str, Any]:
    return {"messages": [ASKED[0], {"role": "assistant", "content": content, "tool_calls": calls}]}


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}],
        [{"name": "clock", "arguments": {"zone": "UTC"}}],
        '[{"name": "clock", "parameters": {"zone": "UTC"}}]',
        [json.dumps(CALL)],
    ],
)
@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_tool_calls_in_every_spelling_become_one_form(calls: object, content: str | None) -> None:
    found = understand(row_of(calling(calls, content)), "messages")
    assert isinstance(found, Conversation), found
    assert found.turns[1] == {"role": "assistant", **({"content": content} if content else {}), "tool_calls": [CALL]}


def test_results_keep_their_name_and_the_call_they_answer() -> None:
    value = calling([{"id": "c1", **CALL}])
    value["messages"] += [{"role": "tool", "content": "12:00", "tool_call_id": "c1", "name": "clock", "weight": None}, ASKED[1]]
    value["tools"] = [{"name": "clock", "description": None}]
    found = understand(row_of(value), "messages")
    assert isinstance(found, Conversation)
    assert found.turns[1]["tool_calls"] == [{"id": "c1", **CALL}]
    assert found.turns[2] == {"role": "tool", "content": "12:00", "tool_call_id": "c1", "name": "clock"}
    assert found.tools == ({"type": "function", "function": {"name": "clock"}},)


def test_sharegpt_has_roles_for_calls_and_results() -> None:
    told = [("human", "time?"), ("function_call", json.dumps(CALL["function"])), ("observation", "12:00"), ("gpt", "Noon.")]
    value = {"conversations": [{"from": role, "value": text} for role, text in told], "tools": '[{"name": "clock"}]', "system": "s"}
    found = understand(row_of(value), "sharegpt")
    assert isinstance(found, Conversation)
    assert found.turns == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "time?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    )
    assert found.tools[0]["function"]["name"] == "clock"


def test_the_old_way_of_calling_functions_is_read_too() -> None:
    old = [ASKED[0], {"role": "assistant", "content": None, "function_call": CALL["function"]}, {"role": "function", "content": "1"}]
    found = understand(row_of({"messages": old, "functions": [{"name": "clock"}]}), "messages")
    assert isinstance(found, Conversation) and found.turns[1]["tool_calls"] == [CALL] and found.turns[2]["role"] == "tool"
    assert len(found.tools) == 1


def test_reasoning_beside_the_answer_reaches_the_template() -> None:
    found = understand(row_of({"messages": [ASKED[0], {**ASKED[1], "reasoning": "hm"}]}), "messages")
    assert isinstance(found, Conversation) and found.turns[1]["reasoning_content"] == found.turns[1]["thinking"] == "hm"


def test_weights_count_from_the_row_although_a_system_text_goes_first() -> None:
    value = {"messages": [*ASKED, ASKED[0], {**ASKED[1], "weight": 0}], "system": "s"}
    found = understand(row_of(value), "messages")
    assert isinstance(found, Conversation) and found.context_only == {4} and found.turns[0]["role"] == "system"


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ('[{"name": "clock", "arguments": {"zone": "\\ud800"}}]', "half of a surrogate pair"),
        ([{"name": "clock", "arguments": '{"zone": "\\udfff"}'}], "half of a surrogate pair"),
        ("[" * 5000, "nested too deeply"),
        (json.loads('{"name": "clock", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}"), "nested more than 100 deep"),
        ([{"name": "clock", "arguments": '{"a": ' + "[" * 200 + "]" * 200 + "}"}], "nested more than 100 deep"),
    ],
)
def test_calls_that_no_template_could_write_are_refused(calls: object, words: str) -> None:
    found = understand(row_of(calling(calls)), "messages")
    assert isinstance(found, Problem) and found.code == "data.bad-tool-call" and words in found.message


def test_a_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " that?"}]
    for format_name, keys in (("messages", ("role", "content")), ("sharegpt", ("from", "value"))):
        turns = [{keys[0]: "user", keys[1]: parts}, {keys[0]: "assistant", keys[1]: [{"text": "A text."}], "weight": 1}]
        found = understand(row_of({"messages": turns}), format_name)
        assert isinstance(found, Conversation), found
        assert [turn["content"] for turn in found.turns] == ["What is that?", "A text."]


@pytest.mark.parametrize(
    ("parts", "code", "message"),
    [
        (
            [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}],
            "data.not-rendered",
            "content[1] is a part of the type image_url",
        ),
        ([{"type": "image", "text": None}], "data.not-rendered", "content[0] is a part of the type image"),
        ([{"type": ["text"]}], "data.not-rendered", 'content[0] is a part of the type ["text"]'),
        (["a", "b"], "data.wrong-type", "content[0] is a string, not a part"),
        ([{"type": "text"}], "data.missing-key", 'content[0] has no "text"'),
        ([{"type": "text", "text": 7}], "data.wrong-type", "content[0].text is a number"),
        ([{"type": "text", "text": " "}], "data.empty-content", "content is only white space"),
        ([], "data.empty-content", "content is empty"),
    ],
)
def test_parts_that_are_not_text_are_reported(parts: list[Any], code: str, message: str) -> None:
    problem = understand(row_of({"messages": [{"role": "user", "content": parts}, ASKED[1]]}), "messages")
    assert isinstance(problem, Problem)
    assert problem.code == code and problem.message.startswith(f"messages[0].{message}")


PARTS = [{"text": "Be "}, {"type": "text", "text": "brief."}]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"system": PARTS, "messages": [{**turn, "content": [{"text": turn["content"]}]} for turn in ASKED]}, {}),
        (
            {
                "systemInstruction": {"parts": PARTS},
                "contents": [{"role": role, "parts": [{"text": text}]} for role, text in (("user", "What?"), ("model", "That."))],
            },
            {"system": "systemInstruction"},
        ),
    ],
)
def test_turns_and_system_text_in_parts_are_read_as_their_text(value: dict[str, Any], names: dict[str, str]) -> None:
    detected = detect([row_of(value)], "auto", names)
    found = understand(row_of(value), detected.name, names)
    assert isinstance(found, Conversation), found
    assert found.turns == ({"role": "system", "content": "Be brief."}, *ASKED)


def test_a_part_of_a_system_text_that_is_no_text_is_refused() -> None:
    found = understand(row_of({"system": [{"type": "image", "image": "x"}], "messages": ASKED}), "messages")
    assert isinstance(found, Problem) and found.code == "data.not-rendered"
