"""Rows with an answer that is labelled good or bad: every spelling is read alike, and what says neither is refused."""

import shlex
from typing import Any

import pytest

from llamahome.config.yamltext import read_value
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import SAMPLE, detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}
SPELLINGS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "completion": "5"},
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": USER, "completion": ANSWER},
    {"question": "2+2?", "response": "5"},
    {"messages": [USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "5"}]},
]
GOOD, BAD = [True, 1, 1.0, "true", "True", "1", "good", "desirable"], [False, 0, 0.0, "false", " FALSE", "0", "bad", "undesirable"]


def row_of(value: dict[str, Any]) -> Row:
    return Row(index=4, source="mine.jsonl", line=5, value=value)


def read(value: dict[str, Any], names: dict[str, str] | None = None) -> Conversation | Problem:
    return understand(row_of(value), "labelled", names or {})


@pytest.mark.parametrize("value", SPELLINGS)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_every_spelling_of_a_labelled_answer_is_the_same(value: dict[str, Any], key: str) -> None:
    for label in (True, False):
        found = read({**value, key: label})
        assert isinstance(found, Conversation), found
        assert found.turns == (USER, ANSWER) and not found.context_only and found.good is label and found.row.value[key] is label


@pytest.mark.parametrize(("labels", "good"), [(GOOD, True), (BAD, False)])
def test_every_spelling_of_a_label_says_the_same(labels: list[Any], good: bool) -> None:
    for label in labels:
        found = read({**SPELLINGS[0], "label": label})
        assert isinstance(found, Conversation) and found.good is good, label


def test_only_the_last_answer_of_a_conversation_is_labelled() -> None:
    found = read({"messages": [USER, ANSWER, USER, ANSWER], "label": 0})
    assert isinstance(found, Conversation) and found.context_only == {1}


def test_columns_with_other_names_are_read_where_the_setting_names_them() -> None:
    found = read({"q": "2+2?", "a": "5", "thumb": "bad", "label": "sums"}, {"prompt": "q", "completion": "a", "label": "thumb"})
    assert isinstance(found, Conversation) and found.turns == (USER, ANSWER) and not found.good


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (SPELLINGS[0], "data.missing-key", '"label"'),
        ({**SPELLINGS[0], "label": None}, "data.unclear-label", "label is null"),
        ({**SPELLINGS[0], "label": 4}, "data.unclear-label", "label is 4"),
        ({**SPELLINGS[0], "label": "fine"}, "data.unclear-label", "label is 'fine'"),
        ({**SPELLINGS[0], "label": [True]}, "data.unclear-label", "label is a list"),
        ({"prompt": "2+2?", "label": True}, "data.missing-key", '"completion"'),
        ({"prompt": "2+2?", "completion": " ", "label": True}, "data.empty-content", "only white space"),
        ({"messages": [USER, ANSWER, USER], "label": True}, "data.no-assistant", "ends with a user turn"),
    ],
)
def test_what_is_no_labelled_answer_is_refused(value: dict[str, Any], code: str, words: str) -> None:
    problem = read(value)
    assert isinstance(problem, Problem) and problem.code == code and words in problem.message, problem


def test_the_reason_names_the_column_and_counts_the_good_answers() -> None:
    rows = [row_of({**SPELLINGS[0], "label": label}) for label in (True, False, "good", "what")]
    assert detect(rows, "labelled").reason == "`label` says whether the answer is good, and 2 of the first 4 are"


@pytest.mark.parametrize(
    ("value", "hint"),
    [(SPELLINGS[0], "--set training.objective=sft"), ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--set training.objective=dpo")],
)
def test_rows_without_labels_are_refused_with_the_objective_that_learns_from_them(value: dict[str, Any], hint: str) -> None:
    with pytest.raises(DataError) as error:
        detect([row_of(value)], "labelled")
    (problem,) = error.value.problems
    assert problem.code == "data.no-labels" and hint in str(problem.hint)


def test_labelled_answers_are_no_answers_to_learn_and_the_help_names_kto() -> None:
    with pytest.raises(DataError) as error:
        detect([row_of({**SPELLINGS[0], "label": False})], "auto")
    (problem,) = error.value.problems
    assert problem.code == "data.preference" and str(problem.hint).startswith("--set training.objective=kto   ")


def test_a_label_within_other_columns_is_found_by_its_path() -> None:
    rows = [row_of({"prompt": "2+2?", "completion": "4", "review": {"marks": [{"ok": said}]}}) for said in (True, False)]
    names = {"prompt": "prompt", "completion": "completion", "label": "review.marks.0.ok"}
    assert "1 of the first 2 are" in detect(rows, "labelled", names).reason
    read_rows = [understand(row, "labelled", names) for row in rows]
    assert [isinstance(one, Conversation) and one.good for one in read_rows] == [True, False]


@pytest.mark.parametrize("column", ["thumbs_up", "isCorrect", "is good", "accepted", "Helpful"])
@pytest.mark.parametrize("said", [(True, False), ("true", "false"), (1, 0)])
@pytest.mark.parametrize("value", [{**SPELLINGS[2], "system_prompt": "Be brief."}, {**SPELLINGS[3], "system_prompt": "Be brief."}])
def test_a_verdict_of_another_name_is_a_label_once_the_help_is_typed(value: dict[str, Any], column: str, said: tuple[Any, ...]) -> None:
    rows = [row_of({**value, column: one}) for one in said]
    with pytest.raises(DataError) as caught:
        detect(rows, "auto")
    (problem,) = caught.value.problems
    assert problem.code == "data.preference" and column in problem.message
    parts = [shlex.split(part.partition("   ")[0]) for part in (problem.hint or "").split("; ") if part.startswith("--set")]
    both, every = (columns_in(part[-1]) for part in parts)
    assert parts[0][:2] == ["--set", "training.objective=kto"] and both == {**every, "label": column}
    for names, format_name in ((both, "labelled"), (every, "auto")):
        detected = detect(rows, format_name, names)
        texts = [understand(row, detected.name, names) for row in rows]
        assert all(isinstance(one, Conversation) and [turn["content"] for turn in one.turns] == ["Be brief.", "2+2?", "5"] for one in texts)
        expected = [True, False] if names is both else [True, True]
        assert [isinstance(one, Conversation) and one.good for one in texts] == expected
    with pytest.raises(DataError) as refused:
        detect(rows, "labelled")
    assert refused.value.problems[0].code == "data.no-labels"
    assert columns_in(shlex.split((refused.value.problems[0].hint or "").partition("   ")[0])[-1]) == both


@pytest.mark.parametrize("said", [(True, True), (3, 0), ("low", "high"), (None, False)])
def test_a_verdict_that_is_always_good_or_that_does_not_say_is_no_label(said: tuple[Any, ...]) -> None:
    rows = [row_of({**SPELLINGS[2], "thumbs_up": one}) for one in said]
    assert detect(rows, "auto").name == "prompt_completion"


@pytest.mark.parametrize("said", [False, "False", " bad"])
@pytest.mark.parametrize("value", [SPELLINGS[2], SPELLINGS[3], {"instruction": "2+2?", "output": "5"}])
def test_a_bad_verdict_behind_the_rows_that_are_examined_is_refused_where_it_is(value: dict[str, Any], said: Any) -> None:
    format_name = detect([row_of({**value, "thumbs_up": True})] * SAMPLE, "auto").name
    problem = understand(row_of({**value, "thumbs_up": said}), format_name)
    assert isinstance(problem, Problem) and problem.code == "data.bad-answer" and problem.where == "mine.jsonl:5"
    assert "thumbs_up says that this answer is bad" in problem.message
    setting = shlex.split((problem.hint or "").removeprefix("remove the row; or ").partition("   ")[0])
    rows = [row_of({**value, "thumbs_up": said})]
    names = columns_in(setting[-1])
    assert isinstance(understand(rows[0], detect(rows, "auto", names).name, names), Conversation)


@pytest.mark.parametrize("value", [{**SPELLINGS[2], "thumbs_up": 0}, {**SPELLINGS[2], "note": "bad"}, {"text": "5", "correct": False}])
def test_numbers_other_columns_and_plain_texts_judge_no_answer(value: dict[str, Any]) -> None:
    assert isinstance(understand(row_of(value), "text" if "text" in value else "prompt_completion"), Conversation)


def columns_in(assignment: str) -> dict[str, str]:
    value = read_value(assignment.removeprefix("data.columns="))
    assert isinstance(value, dict)
    return value
