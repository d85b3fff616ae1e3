"""Empty, boilerplate and cut answers are warnings, and answers that only contain such words are not."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tokenizers import save_tokenizer
from transformers import AutoTokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.checks.answer_quality import find_weakness
from llamahome.data.checks.check import Request, check
from llamahome.data.checks.findings import Found
from llamahome.data.sample import write_sample
from llamahome.data.text.tokenizer_files import TokenizerSource

SENTENCE = "the green river bends past an old mill where seven herons wait for small silver fish under a quiet grey morning sky today"
WORDS = SENTENCE.split()


def run_check(path: Path, *, near: bool = False, tokenizer: TokenizerSource | None = None, **data: Any) -> list[Found]:
    findings: list[Found] = []
    check(Request((str(path),), DataConfig(**data), tokenizer, near=near, processes=1), findings.append)
    return findings


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
        *[("data.cut-answer", text) for text in ('{"a": 1, "b": [2', '[{"a": "один", "b": "дв', '{"a": {"b": 2}')],
    ],
)
def test_a_weak_answer_is_reported(code: str, text: str) -> None:
    expected = find_weakness(text)
    assert expected is not None and expected[0] == code


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
        *('{"a": 1}', "{a", "[1, 2", '{"a": 1} and more', "{", "[", '{"a": 1, b}', '{"a" is a key'),
    ],
)
def test_an_answer_that_only_resembles_a_weak_one_is_not_reported(text: str) -> None:
    assert find_weakness(text) is None


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=30), st.sampled_from(["As an AI language model, I", "{answer}", "Todo", "..."])
)
def test_boilerplate_inside_an_answer_is_not_reported(words: list[str], inside: str) -> None:
    assert find_weakness(f"Here {' '.join(words)} {inside} {' '.join(words)}.") is None


def test_each_row_with_a_weak_answer_is_a_warning_with_its_location(tmp_path: Path) -> None:
    findings = run_check(write(tmp_path / "rows.jsonl", ["Fine.", "...", "Todo", "```\nx"]))
    expected = [(one.level, one.problem.code, one.place.line if one.place else 0) for one in findings]
    assert expected == [("warning", "data.empty-answer", 2), ("warning", "data.boilerplate-answer", 3), ("warning", "data.cut-answer", 4)]


@pytest.mark.parametrize(("unmarked", "expected"), [(2, 2), (6, 0), (60, 0)])
def test_an_end_without_a_mark_is_reported_only_if_the_others_have_one(tmp_path: Path, unmarked: int, expected: int) -> None:
    answers = [f"{number} {' '.join(WORDS)}" + ("." if number >= unmarked else "") for number in range(120)]
    findings = [one for one in run_check(write(tmp_path / "rows.jsonl", answers)) if one.problem.code == "data.cut-answer"]
    assert [one.place.line for one in findings if one.place] == list(range(1, expected + 1))


def near(number: int, last: str) -> dict[str, str]:
    text = " ".join(f"{word}{number}" for word in WORDS * 4)
    return {"prompt": "Tell.", "completion": f"{text} {last}."}


def test_a_row_nearly_in_the_evaluation_data_is_reported_with_both_locations(tmp_path: Path) -> None:
    train, other = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("".join(json.dumps(near(number, "one")) + "\n" for number in range(30)))
    other.write_text("".join(json.dumps(row) + "\n" for row in [near(90, "two"), near(7, "two"), near(9, "one"), near(90, "three")]))
    findings = run_check(train, near=True, eval_path=str(other))
    shared = [(one.problem.code, one.place.line if one.place else 0) for one in findings]
    assert shared == [
        ("data.shared-with-eval", 10),
        ("data.near-shared-with-eval", 8),
    ]  # 90 twice within the evaluation data is not expected
    assert f"{other}:2" in findings[1].problem.message


def test_rows_nearly_held_out_are_counted_with_an_example_of_both_locations(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(near(number % 40, f"w{number}")) + "\n" for number in range(80)))
    codes = [one.problem for one in run_check(train, near=True, eval_split=0.5) if one.problem.code == "data.near-shared-with-eval"]
    assert len(codes) == 1 and codes[0].message.count(f"{train}:") == 2
    assert not [one for one in run_check(train, near=True, eval_split=0) if one.problem.code == "data.near-shared-with-eval"]


def codes(findings: list[Found]) -> list[str]:
    return [one.problem.code for one in findings]


@pytest.mark.parametrize(("answer", "expected"), [("Извините, я не могу ответить на этот вопрос сейчас.", 1), ("да", 0), ("A", 0)])
def test_a_long_answer_in_many_rows_is_reported_once_in_any_language(tmp_path: Path, answer: str, expected: int) -> None:
    findings = run_check(write(tmp_path / "rows.jsonl", [answer] * 30 + [f"{number} is it." for number in range(70)]))
    assert codes(findings) == ["data.repeated-answer"] * expected
    assert all("30 of 100 rows" in one.problem.message for one in findings)


@pytest.mark.parametrize(("longest", "expected"), [(300, 1), (100, 0), (10_000, 0)])
def test_answers_that_all_end_at_one_length_are_reported_once(tmp_path: Path, longest: int, expected: int) -> None:
    texts = [f"{number} " + "".join(chr(0x4E00 + (number * 7 + at * at) % 500) for at in range(280 + number)) for number in range(60)]
    findings = run_check(write(tmp_path / "rows.jsonl", [text[:longest] for text in texts]))
    assert codes(findings) == ["data.cut-answer"] * expected
    assert all("end after exactly 300 characters" in one.problem.message for one in findings)


@pytest.mark.parametrize(("limit", "end", "expected"), [(150, "", 1), (150, " morning.", 0), (40, "", 0), (9999, "", 0)])
def test_answers_that_all_end_at_one_number_of_tokens_are_reported_once(tmp_path: Path, limit: int, end: str, expected: int) -> None:
    model = save_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    source = random.Random(0)
    whole = [f"{number} " + " ".join(source.choices(WORDS, k=20 + number // 2)) + " today." for number in range(120)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in whole]
    answers = [text if len(of_text) <= limit else tokenizer.decode(of_text[:limit]) + end for text, of_text in zip(whole, ids, strict=True)]
    findings = run_check(write(tmp_path / "rows.jsonl", answers), tokenizer=(str(model), None))
    assert codes(findings) == ["data.cut-answer"] * expected
    assert all("tokens of this model" in one.problem.message for one in findings)


@pytest.mark.medium
def test_the_sample_rows_have_no_answer_that_is_empty_boilerplate_repeated_or_cut(tmp_path: Path) -> None:
    path = tmp_path / "sample.jsonl"
    write_sample(path, rows=None)
    assert not {*codes(run_check(path))} & {"data.empty-answer", "data.boilerplate-answer", "data.repeated-answer", "data.cut-answer"}
