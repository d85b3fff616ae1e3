"""Answers that are empty, boilerplate or cut are warned of, and answers that only contain such words are not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, check
from llamahome.data.checks.duplicates import near_known
from llamahome.data.checks.findings import Found
from llamahome.data.checks.learned import _weak

needs_quality = pytest.mark.skipif(not near_known(), reason="the extra `quality` is not installed")
SENTENCE = "the green river bends past an old mill where seven herons wait for small silver fish under a quiet grey morning sky today"
WORDS = SENTENCE.split()


def look(path: Path, *, near: bool = False, **data: Any) -> list[Found]:
    found: list[Found] = []
    check(Request((str(path),), DataConfig(**data), None, near=near, processes=1), found.append)
    return found


def write(path: Path, answers: list[str]) -> Path:
    rows = [{"prompt": f"Question {number}?", "completion": answer} for number, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("code", "text"),
    [
        *[("data.empty-answer", text) for text in ("...", "—", "<think>Let me see.</think>\n", "```\n```", "**", "\u200b.")],
        *[
            ("data.boilerplate-answer", text)
            for text in ("{answer}", "{{ model_response }}", "Todo", "n/a", "N/A.", "[Insert answer here]")
        ],
        ("data.boilerplate-answer", "As an AI language model, I have no opinion."),
        ("data.boilerplate-answer", "I’m sorry, but as an AI I do not eat."),
        ("data.boilerplate-answer", "I cannot fulfil this request."),
        ("data.boilerplate-answer", "Lorem ipsum dolor sit amet."),
        ("data.cut-answer", "So:\n\n```python\nprint(1)"),
    ],
)
def test_an_answer_that_teaches_nothing_is_told(code: str, text: str) -> None:
    told = _weak(text)
    assert told is not None and told[0] == code


@pytest.mark.parametrize(
    "text",
    [
        "A",
        "5",
        "+",
        "?",
        "None",
        "null",
        "{x}",
        "<text>",
        "<p>",
        "-1",
        "😀",
        "Todo lists help to plan a day.",
        "People often quote 'As an AI language model, I cannot' in jokes.",
        "As an AI researcher, Turing asked whether machines think.",
        "As an AI engineer I build models.",
        "I cannot find the file.",
        "I cannot answer this question from the context.",
        "Sorry, the shop is closed.",
        "I am an AI assistant made by Acme.",
        "Use `{answer}` as the name.",
        "```\na\n```\nand\n~~~~\n```\n~~~~",
        "````md\n```py\n````",
    ],
)
def test_an_answer_that_only_looks_like_one_is_left_alone(text: str) -> None:
    assert _weak(text) is None


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=30), st.sampled_from(["As an AI language model, I", "{answer}", "Todo", "..."])
)
def test_the_words_of_boilerplate_inside_an_answer_are_left_alone(words: list[str], inside: str) -> None:
    assert _weak(f"Here {' '.join(words)} {inside} {' '.join(words)}.") is None


def test_each_such_row_is_a_warning_with_its_place(tmp_path: Path) -> None:
    found = look(write(tmp_path / "rows.jsonl", ["Fine.", "...", "Todo", "```\nx"]))
    told = [(one.level, one.problem.code, one.place.line if one.place else 0) for one in found]
    assert told == [("warning", "data.empty-answer", 2), ("warning", "data.boilerplate-answer", 3), ("warning", "data.cut-answer", 4)]


@pytest.mark.parametrize(("unmarked", "told"), [(3, 3), (60, 0)])
def test_an_end_without_a_mark_is_told_only_where_others_have_one(tmp_path: Path, unmarked: int, told: int) -> None:
    answers = [f"{number} {' '.join(WORDS)}" + ("." if number >= unmarked else "") for number in range(120)]
    found = [one for one in look(write(tmp_path / "rows.jsonl", answers)) if one.problem.code == "data.cut-answer"]
    assert [one.place.line for one in found if one.place] == list(range(1, told + 1))


def near(number: int, last: str) -> dict[str, str]:
    text = " ".join(f"{word}{number}" for word in WORDS * 4)
    return {"prompt": "Tell.", "completion": f"{text} {last}."}


@needs_quality
def test_a_row_nearly_in_the_evaluation_data_is_told_with_both_places(tmp_path: Path) -> None:
    train, other = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("".join(json.dumps(near(number, "one")) + "\n" for number in range(30)))
    other.write_text("".join(json.dumps(row) + "\n" for row in [near(90, "two"), near(7, "two"), near(9, "one"), near(90, "three")]))
    found = look(train, near=True, eval_path=str(other))
    shared = [(one.problem.code, one.place.line if one.place else 0) for one in found]
    assert shared == [("data.shared-with-eval", 10), ("data.near-shared-with-eval", 8)]  # 90 twice within the evaluation data is not told
    assert f"{other}:2" in found[1].problem.message


@needs_quality
def test_rows_nearly_held_out_are_counted_with_an_example_of_both_places(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(near(number % 40, f"w{number}")) + "\n" for number in range(80)))
    codes = [one.problem for one in look(train, near=True, eval_split=0.5) if one.problem.code == "data.near-shared-with-eval"]
    assert len(codes) == 1 and codes[0].message.count(f"{train}:") == 2
    assert not [one for one in look(train, near=True, eval_split=0) if one.problem.code == "data.near-shared-with-eval"]
