"""Texts that lie within the columns of a row, as labelling tools export them: data.columns reaches them, and no help line drops them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.data.files.sources import open_source
from llamahome.data.records import Conversation
from llamahome.data.rows.columns import at_path, text_paths
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem


def annotated(question: str, answer: str, kind: str) -> dict[str, Any]:
    result = [{"id": "x", "value": {kind: [answer]}, "from_name": "a", "to_name": "q", "type": kind}]
    return {"id": 1, "annotations": [{"id": 11, "result": result}], "data": {"question": question}, "meta": {}}


def reviewed(question: str, answer: str) -> dict[str, Any]:
    answers = {"answer": [{"value": answer, "user_id": "u", "status": "submitted"}]}
    return {"id": "a", "status": "completed", "fields": {"ask": question}, "responses": answers, "vectors": {}}


def flat(question: str, answer: str) -> dict[str, Any]:
    return {"id": "a", "ask.text": question, "reply.responses": [answer], "reply.responses.users": ["u"]}


TEXTS = [(f"What is {number}?", f"It is {number}.") for number in range(3)]
EXPORTS: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
    "choices": (
        [annotated(*texts, "choices") for texts in TEXTS],
        {"prompt": "{data.question}", "completion": "annotations.0.result.0.value.choices.0"},
    ),
    "texts": (
        [annotated(*texts, "text") for texts in TEXTS],
        {"prompt": "data.question", "completion": "{annotations.0.result.0.value.text.0}"},
    ),
    "fields and responses": ([reviewed(*texts) for texts in TEXTS], {"prompt": "fields.ask", "completion": "responses.answer.0.value"}),
    "keys with dots": ([flat(*texts) for texts in TEXTS], {"prompt": "ask.text", "completion": "{reply.responses.0}"}),
}


def rows_of(export: str, folder: Path) -> list[Any]:
    path = folder / "export.json"
    path.write_text(json.dumps(EXPORTS[export][0]))
    source = open_source(str(path))
    return [source.row(number) for number in range(len(source))]


def problem_of(rows: list[Any], **columns: str) -> Problem:
    with pytest.raises(DataError) as caught:
        detect(rows, "auto", columns)
    return caught.value.problems[0]


@pytest.mark.parametrize("export", EXPORTS)
def test_paths_reach_the_question_and_the_answer(export: str, tmp_path: Path) -> None:
    rows, columns = rows_of(export, tmp_path), EXPORTS[export][1]
    found = detect(rows, "auto", columns)
    conversations = [understand(row, found.name, columns) for row in rows]
    assert all(isinstance(each, Conversation) for each in conversations)
    assert [tuple(turn["content"] for turn in each.turns) for each in conversations] == TEXTS


@pytest.mark.parametrize("export", EXPORTS)
def test_the_refusal_names_the_paths(export: str, tmp_path: Path) -> None:
    hint = str(problem_of(rows_of(export, tmp_path)).hint)
    for written in EXPORTS[export][1].values():
        path = written.strip("{}")
        assert path in hint or path in EXPORTS[export][0][0]
    assert "COLUMN" in hint and "python3" not in hint


def test_a_wrong_path_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    problem = problem_of(rows_of("fields and responses", tmp_path), prompt="fields.ask", completion="{responses.answer.0.valu}")
    assert problem.code == "data.unknown-column" and 'completion: "{responses.answer.0.value}"' in str(problem.hint)


@given(
    st.recursive(
        st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3), max_leaves=8
    )
)
def test_every_path_that_is_named_leads_to_a_text(cell: Any) -> None:
    value = {"column": cell}
    assert all(isinstance(at_path(value, path), str) for path in text_paths(value))
