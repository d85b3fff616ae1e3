"""Answers to be avoided are never learned as good ones, however the columns spell them, and no help line names them."""

import json
from pathlib import Path
from typing import Any

import pytest

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))


def rows_of(*values: dict[str, Any], source: str = "mine.jsonl") -> list[Row]:
    return [Row(number, source, number + 1, value) for number, value in enumerate(values)]


def refused(*values: dict[str, Any], source: str = "mine.jsonl") -> Problem:
    with pytest.raises(DataError) as caught:
        detect(rows_of(*values, source=source), "auto")
    return caught.value.problems[0]


LABELLED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"prompt": "2+2?", "completion": "4", "label": 1}, {"prompt": "2+2?", "completion": "5", "label": 0}),
    ({"prompt": "2+2?", "completion": "4", "label": "True"}, {"prompt": "2+2?", "completion": "5", "label": "False"}),
    ({"prompt": "2+2?", "response": "4", "label": True}, {"prompt": "2+2?", "response": "5", "label": False}),
    ({"question": "2+2?", "answer": "4", "kto_tag": 1}, {"question": "2+2?", "answer": "5", "kto_tag": 0}),
    ({"messages": [USER, GOOD], "label": True}, {"messages": [USER, BAD], "label": False}),
    ({"messages": [USER, GOOD], "kto_tag": "desirable"}, {"messages": [USER, BAD], "kto_tag": "undesirable"}),
    (
        {"instruction": "2+2?", "input": "", "output": "4", "label": "good"},
        {"instruction": "2+2?", "input": "", "output": "5", "label": "bad"},
    ),
]


@pytest.mark.parametrize("rows", LABELLED)
def test_labelled_answers_are_refused_and_kto_reads_them(rows: tuple[dict[str, Any], dict[str, Any]]) -> None:
    problem = refused(*rows)
    assert problem.code == "data.preference" and "--set training.objective=kto" in str(problem.hint)
    read = [understand(row, "labelled") for row in rows_of(*rows)]
    assert [one.good for one in read if isinstance(one, Conversation)] == [True, False]


@pytest.mark.parametrize(
    "values",
    [
        [{"prompt": "2+2?", "completion": "4", "label": number} for number in (0, 1, 2)],
        [{"instruction": "Which?", "output": "positive", "label": number} for number in (0, 1)],
        [{"text": "It is fine.", "label": number} for number in (0, 1)],
        [{"prompt": "2+2?", "response": "4", "label": "sums"}],
    ],
)
def test_labels_that_number_classes_are_no_judgements(values: list[dict[str, Any]]) -> None:
    assert detect(rows_of(*values), "auto").name in ("prompt_completion", "alpaca", "text")


def test_the_command_keeps_the_good_answers_whatever_the_label_is(tmp_path: Path) -> None:
    source = str(tmp_path / "mine.jsonl")
    for good, bad, wanted in ((True, False, ".label)"), (1, 0, ".label == 1)"), ("good", "bad", '.label == "good")')):
        rows = [{"prompt": "2+2?", "completion": "4", "label": label} for label in (good, bad)]
        assert wanted in str(refused(*rows, source=source).hint), json.dumps(good)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("chosen_answer", "rejected_answer"),
        ("response_chosen", "response_rejected"),
        ("good_output", "bad_output"),
        ("Better Response", "Worse Response"),
        ("winning_completion", "losing_completion"),
        ("preferredOutput", "dispreferredOutput"),
    ],
)
def test_two_names_that_differ_in_better_and_worse_are_a_pair(better: str, worse: str) -> None:
    row = {"question": "2+2?", better: "4", worse: "5", "score_chosen": 9.0, "score_rejected": 1.0}
    problem = refused(row)
    assert problem.code == "data.preference" and f"({better}, {worse})" in problem.message and worse not in str(problem.hint)
    pair = understand(rows_of(row)[0], "preference")
    assert isinstance(pair, Conversation) and (pair.turns, pair.other) == ((USER, GOOD), (USER, BAD))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "response": "4", "chosen_model": "a", "rejected_model": "b"},
        {"prompt": "2+2?", "response": "4", "score_chosen": 9.0, "score_rejected": 1.0},
    ],
)
def test_what_is_said_about_answers_is_no_pair(row: dict[str, Any]) -> None:
    assert detect(rows_of(row), "auto").name == "prompt_completion"


@pytest.mark.parametrize("worse", ["rejected_answer", "wrong_answer", "bad_response", "incorrect_answer", "worst_answer"])
def test_no_help_line_names_an_answer_to_be_avoided(worse: str) -> None:
    assert worse not in str(refused({"question": "2+2?", worse: "5"}).hint)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "2+2?", "responses": ["5", "4"], "scores": [0.1, 0.9]},
        {"prompt": "2+2?", "answers": ["5", "4"], "ranks": [1, 0]},
        {"question": "2+2?", "answers": [{"answer": "5", "rank": 2.0}, {"answer": "4", "rank": 1.0}]},
    ],
)
def test_of_rated_answers_the_first_is_not_learned(value: dict[str, Any]) -> None:
    problem = refused(value)
    assert problem.code == "data.unclear-columns" and "several answers" in problem.message and "--set" not in str(problem.hint)


def test_of_equal_answers_the_first_is_learned() -> None:
    row = rows_of({"question": "2+2?", "answers": ["4", "four"], "scores": [1, 1]})
    found = understand(row[0], detect(row, "auto").name)
    assert isinstance(found, Conversation) and found.turns == (USER, GOOD)
