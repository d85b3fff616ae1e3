"""What a body asks is understood as the OpenAI API means it, and what cannot be obeyed is refused by its name."""

import json

import pytest

from llamahome.model.sampling import Sampling
from llamahome.serving.asked import Refused, parse, read_chat, read_completion

ASK = {"messages": [{"role": "user", "content": "Hi"}]}
NAMES = ("mine", "latest")


def test_a_full_request_is_understood() -> None:
    body = {
        "model": "latest",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": ""},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_completion_tokens": 7,
        "stop": ["\n", "x"],
        "seed": 3,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "me",
        "tools": None,
        "response_format": {"type": "text"},
        "presence_penalty": 0.0,
    }
    asked = read_chat(body, NAMES, Sampling(top_k=5))
    assert [turn["role"] for turn in asked.turns] == ["system", "user", "assistant", "user"] and asked.turns[1]["content"] == "ab"
    assert asked.sampling == Sampling(temperature=0.5, top_p=0.9, seed=3, max_new_tokens=7, top_k=5)
    assert (asked.stops, asked.stream, asked.include_usage) == (("\n", "x"), True, True)


def test_defaults_hold_for_what_is_not_named_and_a_huge_length_is_only_long() -> None:
    default = Sampling(temperature=0.3, seed=1, max_new_tokens=9)
    assert read_chat(ASK, NAMES, default).sampling == default
    assert read_chat({**ASK, "temperature": 0, "seed": None}, NAMES, default).sampling == Sampling(seed=1, max_new_tokens=9)
    assert read_chat({**ASK, "max_tokens": 10**40}, NAMES, default).sampling.max_new_tokens == 2**31
    assert read_completion({"prompt": ["a"], "max_tokens": 2}, NAMES, default).text == "a"


BAD = (
    ("messages", {"messages": []}),
    ("messages", {"messages": "Hi"}),
    ("messages", {}),
    ("messages[0]", {"messages": ["Hi"]}),
    ("messages[0].role", {"messages": [{"content": "Hi"}]}),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "Hi"}]}),
    ("messages[0].role", {"messages": [{"role": ["user"], "content": "Hi"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["Hi"]}]}),
    ("messages[0]", {"messages": [{"role": "tool", "content": "Hi", "tool_call_id": "x"}]}),
    ("messages[0]", {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}),
    ("messages[0]", {"messages": [{"role": "user", "content": "Hi", "name": "Bob"}]}),
    ("model", {**ASK, "model": "gpt-5"}),
    ("model", {**ASK, "model": 5}),
    ("n", {**ASK, "n": 2}),
    ("n", {**ASK, "n": True}),
    ("tools", {**ASK, "tools": [{"type": "function"}]}),
    ("tool_choice", {**ASK, "tool_choice": "required"}),
    ("response_format", {**ASK, "response_format": {"type": "json_object"}}),
    ("logprobs", {**ASK, "logprobs": True}),
    ("logit_bias", {**ASK, "logit_bias": {"5": 1}}),
    ("presence_penalty", {**ASK, "presence_penalty": 0.5}),
    ("store", {**ASK, "store": True}),
    ("temperature", {**ASK, "temperature": -1}),
    ("temperature", {**ASK, "temperature": 2.5}),
    ("temperature", {**ASK, "temperature": "0.5"}),
    ("temperature", {**ASK, "temperature": True}),
    ("temperature", {**ASK, "temperature": [1]}),
    ("top_p", {**ASK, "top_p": 1.5}),
    ("top_k", {**ASK, "top_k": -2}),
    ("max_tokens", {**ASK, "max_tokens": 0}),
    ("max_tokens", {**ASK, "max_tokens": 1.5}),
    ("max_tokens", {**ASK, "max_tokens": 3, "max_completion_tokens": 4}),
    ("max_completion_tokens", {**ASK, "max_completion_tokens": "many"}),
    ("seed", {**ASK, "seed": 1.5}),
    ("seed", {**ASK, "seed": 2**70}),
    ("stop", {**ASK, "stop": ""}),
    ("stop", {**ASK, "stop": [1]}),
    ("stop", {**ASK, "stop": {}}),
    ("stop", {**ASK, "stop": ["a"] * 17}),
    ("stream", {**ASK, "stream": "yes"}),
    ("stream_options", {**ASK, "stream_options": {"include_usage": True}}),
    ("stream_options", {**ASK, "stream": True, "stream_options": {"more": 1}}),
    ("stream_options.include_usage", {**ASK, "stream": True, "stream_options": {"include_usage": 1}}),
    ("temprature", {**ASK, "temprature": 1}),
    ("max_new_tokens", {**ASK, "max_new_tokens": 1}),
)


@pytest.mark.parametrize(("param", "body"), BAD, ids=[f"{number}-{param}" for number, (param, _) in enumerate(BAD)])
def test_what_cannot_be_obeyed_is_refused_by_its_name(param: str, body: dict) -> None:
    with pytest.raises(Refused) as refused:
        read_chat(parse(json.dumps(body).encode()), NAMES, Sampling())
    assert refused.value.param == param and refused.value.status == (404 if body.get("model") == "gpt-5" else 400)
    error = refused.value.body()["error"]
    assert error["type"] == "invalid_request_error" and error["message"] and set(error) == {"message", "type", "param", "code"}


BODIES = (
    b"",
    b"{",
    b"[]",
    b"5",
    b"\xff\xfe",
    b'{"a": NaN}',
    b'{"a": 1, "a": 2}',
    b'{"a": "\\ud800"}',
    b"[" * 200_000,
    b'{"a": 1' + b"0" * 9000 + b"}",
    b"\x00",
    b"null",
)


@pytest.mark.parametrize("body", BODIES, ids=[repr(body[:12]) for body in BODIES])
def test_a_body_that_is_no_object_of_json_is_refused(body: bytes) -> None:
    with pytest.raises(Refused):
        parse(body)
