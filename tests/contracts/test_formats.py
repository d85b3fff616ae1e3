"""Every format passes the same battery: it is detected with a reason, understood, and names what is wrong with a row and where."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import FORMATS, understand
from llamahome.errors import DataError, Problem

ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
GOOD: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": ASKED},
        {"conversations": [{"role": "system", "content": ""}, *ASKED], "id": 7},
        {"messages": [{**turn, "weight": 1, "tool_calls": None} for turn in ASKED], "tools": []},
        {"messages": json.dumps(ASKED), "system": "s"},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]},
        {"messages": [{"from": "system", "value": "s"}, {"from": "user", "value": "What?"}, {"from": "model", "value": "That."}]},
    ],
    "alpaca": [
        {"instruction": "What?", "output": "That."},
        {"instruction": "What?", "input": "", "output": "That.", "system": None, "history": []},
    ],
    "prompt_completion": [{"prompt": "What?", "completion": "That."}, {"prompt": ASKED[:1], "completion": ASKED[1:]}],
    "text": [{"text": "What? That."}],
}
CASES = [(name, row) for name, rows in GOOD.items() for row in rows]
# The place of the answer in the first good row of each format.
ANSWER = {
    "messages": ("messages", 1, "content"),
    "sharegpt": ("conversations", 1, "value"),
    "alpaca": ("output",),
    "prompt_completion": ("completion",),
    "text": ("text",),
}
NAMES = {
    "messages": "messages[1].content",
    "sharegpt": "conversations[1].value",
    "alpaca": "output",
    "prompt_completion": "completion",
    "text": "text",
}


def row_of(value: dict[str, Any], line: int = 5) -> Row:
    return Row(line - 1, "mine.jsonl", line, value)


def with_answer(name: str, answer: object) -> dict[str, Any]:
    value = copy.deepcopy(GOOD[name][0])
    *path, last = ANSWER[name]
    part: Any = value
    for key in path:
        part = part[key]
    part[last] = answer
    return value


def without_answer(name: str, rename: str | None) -> dict[str, Any]:
    value = copy.deepcopy(GOOD[name][0])
    *path, last = ANSWER[name]
    part: Any = value
    for key in path:
        part = part[key]
    answer = part.pop(last)
    if rename is not None:
        part[rename] = answer
    return value


def test_the_battery_covers_every_format() -> None:
    assert set(GOOD) == set(ANSWER) == set(FORMATS)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_it_is_detected_with_a_reason(name: str, value: dict[str, Any]) -> None:
    found = detect([row_of(value)] * 3, "auto")
    assert found.name == name and found.reason.startswith("every row has")
    assert detect([row_of({"odd": 1})], name).reason == f"data.format is {name}"


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_good_row_is_understood(name: str, value: dict[str, Any]) -> None:
    found = understand(row_of(value), name)
    assert isinstance(found, Conversation), found
    if name == "text":
        assert found.text == "What? That." and not found.turns
    else:
        assert [turn for turn in found.turns if turn["role"] != "system"] == ASKED


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (None, "data.null-content"),
        ("", "data.empty-content"),
        (" \n", "data.empty-content"),
        (7, "data.wrong-type"),
        (["x"], "data.wrong-type"),
    ],
)
def test_a_bad_answer_is_named_with_its_place(name: str, answer: object, code: str) -> None:
    problem = understand(row_of(with_answer(name, answer)), name)
    assert isinstance(problem, Problem)
    assert problem.where == "mine.jsonl:5" and problem.excerpt is not None and problem.excerpt.startswith("5 | ")
    assert problem.code == code
    assert NAMES[name] in problem.message or name == "prompt_completion"


@pytest.mark.parametrize("name", FORMATS)
def test_a_misspelt_key_is_named_with_the_right_one(name: str) -> None:
    key = str(ANSWER[name][-1])
    misspelt = key[:-2] + key[-1]
    problem = understand(row_of(without_answer(name, misspelt)), name)
    assert isinstance(problem, Problem) and problem.code == "data.missing-key"
    assert misspelt in problem.message and problem.hint == f'rename "{misspelt}" to "{key}"'
    missing = understand(row_of(without_answer(name, None)), name)
    assert isinstance(missing, Problem) and missing.code == "data.missing-key" and f'no "{key}"' in missing.message


TURN_KEYS = ["role", "content", "from", "value", "weight", "tool_calls", "name", "arguments", "function"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "name", "arguments", "function"])
            | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    ["messages", "conversations", "instruction", "input", "output", "history", "system", "prompt", "completion", "text", "tools"]
)


@pytest.mark.medium
@settings(deadline=None, max_examples=150)
@given(st.dictionaries(keys, json_values, max_size=5), st.sampled_from(sorted(FORMATS)))
def test_any_row_gives_a_conversation_or_a_problem(value: dict[str, Any], name: str) -> None:
    found = understand(row_of(value), name)
    assert isinstance(found, Conversation | Problem)
    try:
        assert detect([row_of(value)], "auto").name in FORMATS
    except DataError as error:
        assert error.problems[0].where == "mine.jsonl:5"


def turns(*pairs: tuple[object, object]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def calling(calls: object, content: object = None) -> dict[str, Any]:
    return {"messages": [ASKED[0], {"role": "assistant", "content": content, "tool_calls": calls}]}


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (turns(("user", "a"), ("asistant", "b")), "data.unknown-role", 'messages[1].role is "asistant"'),
        (turns(("user", "a"), ("bot", "b")), "data.unknown-role", 'messages[1].role is "bot"'),
        (turns(("user", "a"), (3, "b")), "data.wrong-type", "messages[1].role is a number"),
        (turns(("user", "a")), "data.no-assistant", "no assistant turn, only user"),
        (turns(("user", "a"), ("assistant", "b"), ("assistant", "c")), "data.turn-order", "messages[2]"),
        (turns(("user", "a"), ("system", "b"), ("assistant", "c")), "data.turn-order", "messages[1] is a system turn"),
        (turns(("tool", "a"), ("assistant", "b")), "data.turn-order", "messages[0] is a tool result"),
        (turns(("user", ""), ("assistant", "b")), "data.empty-content", "messages[0].content is empty"),
        ({"messages": []}, "data.no-turns", "empty list"),
        ({"messages": "hello"}, "data.wrong-type", "messages is a string"),
        ({"messages": {"role": "user"}}, "data.wrong-type", "messages is an object"),
        ({"messages": ["hello"]}, "data.wrong-type", "messages[0] is a string"),
        ({"mesages": ASKED}, "data.missing-key", '"mesages"'),
        (calling([{"id": "1"}]), "data.bad-tool-call", 'messages[1].tool_calls[0] has no "name"'),
        (calling([{"name": "clock", "arguments": "{zone"}]), "data.bad-tool-call", "messages[1].tool_calls[0].arguments is not valid JSON"),
        (calling([{"name": "clock", "arguments": [1]}]), "data.bad-tool-call", "arguments is a list, not an object"),
        (calling("clock"), "data.bad-tool-call", "messages[1].tool_calls is not valid JSON"),
        (calling(7), "data.bad-tool-call", "messages[1].tool_calls is a number"),
        (
            {"messages": [{**ASKED[0], "tool_calls": [{"name": "clock"}]}, ASKED[1]]},
            "data.bad-tool-call",
            "messages[0] is a user turn with tool_calls",
        ),
        ({"messages": ASKED, "tools": [{"nam": "clock"}]}, "data.bad-tool-call", 'tools[0] is not a tool definition: it has no "name"'),
        ({"messages": ASKED, "tools": {"name": "clock"}}, "data.bad-tool-call", "tools is an object"),
        ({"messages": [ASKED[0], {**ASKED[1], "images": ["a.png"]}]}, "data.not-rendered", "messages[1].images"),
        ({"messages": [{**ASKED[0], "thinking": "hm"}, ASKED[1]]}, "data.not-rendered", "messages[0].thinking is in a user turn"),
        ({"messages": [{"role": "system", "content": "a"}, *ASKED], "system": "b"}, "data.turn-order", "system text beside messages[0]"),
        ({"messages": '[{"role": "user"'}, "data.wrong-type", "messages is a string that is not a JSON list"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0}]}, "data.no-assistant", "weight 0"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, "data.wrong-type", "messages[1].weight is 0.5"),
    ],
)
def test_what_is_wrong_with_a_chat_is_said_with_its_path(value: dict[str, Any], code: str, words: str) -> None:
    problem = understand(row_of(value), "messages")
    assert isinstance(problem, Problem)
    assert (problem.code, problem.where) == (code, "mine.jsonl:5")
    assert words in problem.message


def test_a_misspelt_role_is_answered_with_the_right_one() -> None:
    problem = understand(row_of(turns(("user", "a"), ("asistant", "b"))), "messages")
    assert isinstance(problem, Problem) and problem.hint == 'write "assistant" instead of "asistant"'


def test_a_turn_of_weight_zero_is_context() -> None:
    value = {"messages": [ASKED[0], {**ASKED[1], "train": False}, *ASKED]}
    found = understand(row_of(value), "messages")
    assert isinstance(found, Conversation) and found.context_only == {1}


def test_answers_in_a_prompt_are_context() -> None:
    found = understand(row_of({"prompt": [*ASKED, ASKED[0]], "completion": [ASKED[1]]}), "prompt_completion")
    assert isinstance(found, Conversation) and found.context_only == {1}
    mixed = understand(row_of({"prompt": "What?", "completion": [ASKED[1]]}), "prompt_completion")
    assert isinstance(mixed, Problem) and mixed.code == "data.wrong-type"


def test_alpaca_joins_input_and_unfolds_history() -> None:
    value = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief", "history": [["a", "b"]]}
    found = understand(row_of(value), "alpaca")
    assert isinstance(found, Conversation)
    assert [(turn["role"], turn["content"]) for turn in found.turns] == [
        ("system", "Be brief"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]
    for history in ("x", [["a"]], [["a", None]]):
        assert isinstance(understand(row_of({**value, "history": history}), "alpaca"), Problem)
