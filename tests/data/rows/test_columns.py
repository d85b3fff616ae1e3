"""Templates of data.columns give the expected text, leave no dangling parts, and report what is wrong with them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.config.columns import template_pieces
from llamahome.config.load import load_config
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.columns import rendered
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import ConfigError, DataError, Problem

TEXT = st.text(alphabet=st.sampled_from("ab {}\n:é"), max_size=12)


@settings(deadline=None, max_examples=200)
@given(TEXT, TEXT, st.text(alphabet="ab{}\n", min_size=1, max_size=6).filter(str.strip))
def test_a_template_is_its_text_with_the_cell_in_it(before: str, after: str, cell: str) -> None:
    before, after = before.strip("\n"), after.strip("\n")
    doubled = [part.replace("{", "{{").replace("}", "}}") for part in (before, after)]
    assert rendered(f"{doubled[0]}{{q}}{doubled[1]}", {"q": cell}) == f"{before}{cell}{after}"


@settings(deadline=None, max_examples=200)
@given(TEXT)
def test_any_text_is_a_template_or_refused_with_words(written: str) -> None:
    try:
        pieces = template_pieces(written)
    except ValueError as error:
        assert "a brace" in str(error)
        return
    again = "".join(f"{{{column}}}" if column else text.replace("{", "{{").replace("}", "}}") for text, column in pieces)
    assert again == written


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q}\n\n{empty}", "Why?"),
        ("{empty}\n\n{q}", "Why?"),
        ("Question: {q}\nHint: {empty}\nAnswer:", "Question: Why?\nAnswer:"),
        ("Context:\n{empty}\n\nQuestion: {q}", "Question: Why?"),
        ("{q} {empty}", "Why?"),
        ("{q} is {number}, {sure}", "Why? is 1.5, true"),
        ("{{q}} {q}", "{q} Why?"),
        ("Answer: {empty}", ""),
    ],
)
def test_an_empty_column_leaves_nothing_dangling(template: str, text: str) -> None:
    for empty in (None, "", " \n"):
        assert rendered(template, {"q": "Why?", "empty": empty, "number": 1.5, "sure": True}) == text
    assert rendered(template, {"q": "Why?", "number": 1.5, "sure": True}) == text


def columns(text: str) -> dict[str, str]:
    return load_config(assignments=[f"data.columns={text}"]).config.data.columns


def row_of(value: dict[str, Any]) -> Row:
    return Row(0, "mine.jsonl", 1, value)


def test_a_template_reads_a_row_in_every_format_that_takes_texts() -> None:
    value = {"a": "one", "b": "two", "messages": "not these"}
    for names, texts in (
        (columns('{prompt: "{a}\\n\\n{b}", completion: b, system: "Say {b}."}'), ["Say two.", "one\n\ntwo", "two"]),
        (columns('{instruction: a, input: "({b})", output: "{b}!"}'), ["one\n\n(two)", "two!"]),
        (columns('{text: "{a} {b}"}'), ["one two"]),
    ):
        found = detect([row_of(value)], "auto", names)
        assert "\n" not in found.reason
        read = understand(row_of(value), found.name, names)
        assert isinstance(read, Conversation), read
        assert [read.text] * (read.text is not None) + [turn["content"] for turn in read.turns] == texts
        assert read.row.value is value, "the row itself is untouched"


def test_what_is_wrong_with_a_template_is_reported() -> None:
    with pytest.raises(DataError, match='no row has the key "contxt"') as caught:
        detect([row_of({"q": "a", "context": "c", "answer": "b"})], "auto", columns('{prompt: "{q}: {contxt}", completion: answer}'))
    assert caught.value.problems[0].hint == "--set 'data.columns={prompt: \"{q}: {context}\", completion: answer}'"
    names = columns('{prompt: "{q}", completion: "{parts}"}')
    with pytest.raises(DataError, match="parts is a list; a template of"):
        detect([row_of({"q": "a", "parts": ["b"]})], "auto", names)
    good, bad = row_of({"q": "a", "parts": "b"}), row_of({"q": "a", "parts": ["b"]})
    found = detect([bad, good], "auto", names)
    assert "1 of the first 2 rows" in found.reason
    problem = understand(bad, found.name, names)
    assert isinstance(problem, Problem) and (problem.code, problem.where) == ("data.wrong-type", "mine.jsonl:1")
    for written in ('{prompt: "{q"}', '{prompt: "q}"}', '{messages: "{a}"}', "{promt: a}"):
        with pytest.raises(ConfigError):
            columns(written)


def test_an_answer_without_any_text_is_refused() -> None:
    names = columns('{prompt: q, completion: "Answer: {a}"}')
    problem = understand(row_of({"q": "a", "a": ""}), "prompt_completion", names)
    assert isinstance(problem, Problem) and problem.code == "data.empty-content"
