"""JSON is read as Python reads it, but repeated keys, NaN and lone surrogates are refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data.files.jsontext import LoneSurrogate, RepeatedKey, from_json, without_repeats

texts = st.text(st.characters(codec="utf-8"), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


@settings(deadline=None, max_examples=100)
@given(values, st.booleans(), st.sampled_from(("", " ", "\r", "\t \n")))
def test_json_is_read_as_python_reads_it(value: Any, escaped: bool, after: str) -> None:
    assert from_json(after + json.dumps(value, ensure_ascii=escaped) + after) == value


@settings(deadline=None, max_examples=60)
@given(values, values, texts, st.lists(st.sampled_from(("key", 0)), max_size=4))
def test_a_repeated_key_is_found_wherever_it_is(one: Any, other: Any, key: str, way: list[str | int]) -> None:
    text = f"{{{json.dumps(key)}: {json.dumps(one)}, {json.dumps(key)}: {json.dumps(other)}}}"
    path = ""
    for step in reversed(way):
        text = f'{{"key": {text}}}' if step == "key" else f"[{text}]"
    for step in way:
        path += ".key" if step == "key" else "[0]"
    with pytest.raises(RepeatedKey) as caught:
        from_json(text)
    assert caught.value.path == f"{path}.{key}".removeprefix(".")
    assert (without_repeats(text) is not None) == (one == other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2', "Expecting"),
        ('{"a": 1, "a": NaN}', "NaN is not a JSON value"),
        ('{"a": NaN, "a": 1}', "NaN is not a JSON value"),
        ('{"a": ' + "1" * 5000 + "}", "too many digits"),
        ('{"a": 1, "a": ' + "1" * 5000 + "}", "too many digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": {}, "b": ' + '{"c":' * 100_000, "nested too deeply"),
        ('{"a": 1} {"b": 1}', "Extra data"),
        ('\ufeff{"a": 1}', "BOM"),
    ],
)
def test_broken_json_is_reported_before_a_repeated_key(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_json(text)
    assert not isinstance(caught.value, RepeatedKey)


def test_a_lone_surrogate_is_refused_and_its_message_can_be_written() -> None:
    with pytest.raises(LoneSurrogate):
        from_json('{"a": "\\ud800"}')
    with pytest.raises(RepeatedKey) as caught:
        from_json('{"\\ud800": "\\ud801", "\\ud800": 2}')
    assert str(caught.value).encode("utf-8")
