"""Rows with two answers: every spelling gives the same pair, and what nothing can be learned from is refused."""

from typing import Any

import pytest

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.detect import detect
from llamahome.data.rows.formats import understand
from llamahome.errors import DataError, Problem

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
SYSTEM = {"role": "system", "content": "Count."}
SPELLINGS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": "4", "rejected": "5"},
    {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.0, "score_rejected": 1.0},
    {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"question": "2+2?", "chosen": "4", "rejected": "5"},
    {"instruction": "2+2?", "accepted": "4", "rejected": "5"},
    {"chosen": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "rejected": [USER, BAD]},
    {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
    {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    {"prompt": "2+2?", "chosen": GOOD, "rejected": BAD},
    {"messages": [USER], "chosen": "4", "rejected": "5"},
    {"messages": [USER, GOOD], "prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
]


def row_of(value: dict[str, Any]) -> Row:
    return Row(index=4, source="mine.jsonl", line=5, value=value)


def read(value: dict[str, Any], names: dict[str, str] | None = None) -> Conversation | Problem:
    return understand(row_of(value), "preference", names or {})


@pytest.mark.parametrize("value", SPELLINGS)
def test_every_spelling_of_a_pair_is_the_same_pair(value: dict[str, Any]) -> None:
    pair = read(value)
    assert isinstance(pair, Conversation), pair
    assert pair.turns == (USER, GOOD) and pair.other == (USER, BAD) and not pair.context_only


def test_a_system_text_and_earlier_answers_are_the_prompt() -> None:
    before = [USER, GOOD, {"role": "user", "content": "and 3+3?"}]
    ends = [{"role": "assistant", "content": text} for text in ("6", "7")]
    pair = read({"system": "Count.", "chosen": [*before, ends[0]], "rejected": [*before, ends[1]]})
    assert isinstance(pair, Conversation)
    assert pair.turns == (SYSTEM, *before, ends[0]) and pair.other == (SYSTEM, *before, ends[1])
    assert pair.context_only == {2}, "the answer before is read and not learned"


def test_columns_with_other_names_are_read_where_the_setting_names_them() -> None:
    pair = read({"q": "2+2?", "good": "4", "bad": "5"}, {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert isinstance(pair, Conversation) and (pair.turns[-1], pair.other[-1]) == (GOOD, BAD)


def test_a_transcript_of_several_turns_is_its_turns_and_a_text_about_transcripts_stays_a_text() -> None:
    first = "\n\nHuman: 2+2?\n\nAssistant: 4\n\nHuman: and 3+3?\n\nThink.\n\nAssistant: "
    pair = read({"chosen": first + "6", "rejected": first + "7"})
    assert isinstance(pair, Conversation)
    assert [turn["content"] for turn in pair.turns] == ["2+2?", "4", "and 3+3?\n\nThink.", "6"] and pair.context_only == {1}
    pair = read({"prompt": "2+2?", "chosen": "Human: an animal", "rejected": "5"})
    assert isinstance(pair, Conversation) and pair.turns[-1]["content"] == "Human: an animal"


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "data.equal-answers", "the same answer"),
        ({"prompt": "2+2?", "chosen": "4"}, "data.missing-key", '"rejected"'),
        ({"prompt": "2+2?", "chosen": "", "rejected": "5"}, "data.empty-content", "chosen is empty"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "  "}, "data.empty-content", "rejected is only white space"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "1+1?"}, BAD]}, "data.different-prompts", "from turn 0, a user turn"),
        ({"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER]}, "data.no-assistant", "no assistant turn"),
        ({"chosen": "4", "rejected": "5"}, "data.missing-key", '"prompt"'),
    ],
)
def test_what_is_no_pair_is_refused(value: dict[str, Any], code: str, words: str) -> None:
    problem = read(value)
    assert isinstance(problem, Problem) and problem.code == code and words in problem.message, problem


def test_a_pair_without_its_question_is_refused_with_a_setting_that_names_it() -> None:
    problem = read({"chosen": "4", "rejected": "5", "text": "2+2?"})
    assert isinstance(problem, Problem) and "data.columns={prompt: COLUMN}" in str(problem.hint)
    assert problem.message == 'the row has no "prompt" beside chosen and rejected, which are answers to it'
    assert isinstance(read({"chosen": "4", "rejected": "5", "text": "2+2?"}, {"prompt": "text"}), Conversation)


def test_the_reason_names_the_columns() -> None:
    assert detect([row_of(SPELLINGS[0])], "preference").reason == "`chosen` and `rejected` are the answers to one prompt"
    assert detect([row_of(SPELLINGS[7])], "preference").reason == "`accepted` and `rejected` are the answers to one prompt"
    assert "conversations that begin alike" in detect([row_of(SPELLINGS[5])], "preference").reason


def test_rows_with_one_answer_are_refused_with_the_objective_that_learns_from_them() -> None:
    with pytest.raises(DataError) as error:
        detect([row_of({"prompt": "a", "completion": "b"})], "preference")
    (problem,) = error.value.problems
    assert problem.code == "data.no-pairs" and "--set training.objective=sft" in str(problem.hint)


@pytest.mark.parametrize(("answer", "said"), [(5, "a number"), (2.5, "a number"), (True, "true or false"), (float("nan"), "NaN")])
def test_an_answer_of_a_pair_that_is_no_text_is_refused_without_a_setting_that_pairs_do_not_have(answer: object, said: str) -> None:
    problem = read({"prompt": "2+2?", "chosen": "4", "rejected": answer})
    assert isinstance(problem, Problem) and problem.code == "data.wrong-type"
    assert problem.message == f"rejected is {said}, not a string" and "--set" not in str(problem.hint) and "string" in str(problem.hint)
