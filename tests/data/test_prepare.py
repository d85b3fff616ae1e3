"""Every row is counted, bad rows are listed or left out by the rule, and nothing is on both sides of the hold-out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import CHATML, train_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.prepare import Prepared, prepare
from llamahome.data.steps.holdout import held_out
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import DataError

Write = Callable[[list[Any]], str]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer())


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def _write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return _write


def asked(question: str, answer: str = "Fine.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def read(path: str, tokenizer: ChatTokenizer, **settings: Any) -> Prepared:
    return prepare(DataConfig(**settings), path, tokenizer, say=lambda _: None)


def trained(found: Prepared) -> ExampleTable:
    """The rows that are trained on, in the order of the files."""
    return found.examples.examples_of(found.order.first_rows(10**6))


def fails(path: str, tokenizer: ChatTokenizer, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, tokenizer, **settings)
    return caught.value


def texts(table: ExampleTable, tokenizer: ChatTokenizer) -> list[str]:
    return [tokenizer.decode(table.example(number).tokens) for number in range(len(table))]


def test_examples_stand_in_the_order_of_the_rows_with_their_places(write: Write, tokenizer: ChatTokenizer) -> None:
    path = write([asked(f"question {number}") for number in range(20)])
    found = read(path, tokenizer, eval_split=0)
    assert found.evaluation is None
    assert [trained(found).example(n).row for n in range(20)] == list(range(20))
    assert [trained(found).example(n).line for n in range(20)] == list(range(1, 21))
    assert all(f"question {n}<" in text for n, text in enumerate(texts(trained(found), tokenizer)))
    assert trained(found).example(3).source == path and len(trained(found).example(3).tokens) == trained(found).lengths[3]


def test_every_row_is_counted(write: Write, tokenizer: ChatTokenizer) -> None:
    rows = [*(asked(f"q{n}", "word " * n) for n in range(1, 30)), "{broken", asked("x" * 200, "cut off whole"), asked("q1", "word ")]
    path = write(rows)
    report = read(path, tokenizer, on_bad_row="skip", max_bad_share=0.5, max_length=40, max_lost_share=1, eval_split=5).report
    assert report.rows == len(rows) == report.kept + report.bad + report.without_targets + report.overlong_dropped
    assert (report.bad, report.without_targets, report.eval_rows, report.duplicates) == (1, 1, report.eval_examples, 1)
    assert report.overlong_truncated > 1 and report.cut_tokens > report.cut_targets > 0
    assert report.longest_where.startswith(path) and report.longest_tokens > 40
    words = "\n".join(report.lines())
    for part in ("cut to max_length", "nothing to learn", "content of an earlier one", "format messages", "1 bad row left"):
        assert part in words
    dropped = read(
        path, tokenizer, on_bad_row="skip", max_bad_share=0.5, max_length=40, max_lost_share=1, on_overlong="drop", eval_split=0
    ).report
    assert dropped.overlong_dropped == report.overlong_truncated and dropped.kept + dropped.overlong_dropped + dropped.bad == len(rows)


def test_bad_rows_are_all_listed_with_file_and_line(write: Write, tokenizer: ChatTokenizer) -> None:
    path = write([asked("a"), '{"messages"', {"messages": [{"role": "usr", "content": "b"}]}, asked("a <|im_end|> b"), asked("c")])
    error = fails(path, tokenizer)
    assert error.exit_status == 3
    assert [(problem.code, problem.where) for problem in error.problems] == [
        ("data.bad-json", f"{path}:2"),
        ("data.unknown-role", f"{path}:3"),
        ("data.control-token-in-text", f"{path}:4"),
        ("data.bad-rows", path),
    ]
    assert error.problems[-1].hint is not None and "max_bad_share=0.6" in error.problems[-1].hint
    assert read(path, tokenizer, on_bad_row="skip", max_bad_share=0.6).report.bad == 3
    still = fails(path, tokenizer, on_bad_row="skip", max_bad_share=0.5)
    assert "data.max_bad_share allows 0.5" in still.problems[-1].message


def test_at_most_twenty_bad_rows_are_shown_and_all_are_counted(write: Write, tokenizer: ChatTokenizer) -> None:
    error = fails(write([asked("a")] + ["nope"] * 30), tokenizer)
    assert len(error.problems) == 21 and "30 of 31 rows" in error.problems[-1].message and "first 20" in error.problems[-1].message
    assert "not one of them" in str(fails(write([{"messages": 1}] * 3), tokenizer, format="messages").problems[-1].hint)
    assert len(fails(write(["nope"] * 30), tokenizer).problems) == 20


def test_when_the_template_is_at_fault_the_rows_are_not_blamed(write: Write) -> None:
    thinking = ChatTokenizer(train_tokenizer(template=CHATML.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>\n'")))
    error = fails(write([asked("a"), asked("b")]), thinking)
    assert [problem.code for problem in error.problems] == ["data.mask-unproved", "data.mask-unproved", "data.bad-rows"]
    assert error.problems[-1].hint == error.problems[0].hint and "chat_template" in str(error.problems[0].hint)


def test_overlong_rows_stop_the_run_when_told_to(write: Write, tokenizer: ChatTokenizer) -> None:
    path = write([asked("a"), asked("a", "long " * 50)])
    error = fails(path, tokenizer, on_overlong="error", max_length=30, on_bad_row="skip", max_bad_share=0.9)
    assert [problem.code for problem in error.problems] == ["data.overlong", "data.bad-rows"]


@pytest.mark.parametrize("on_overlong", ["truncate", "drop"])
def test_when_every_answer_is_cut_off_the_hint_keeps_them(write: Write, tokenizer: ChatTokenizer, on_overlong: str) -> None:
    path = write([asked("word " * number, "the end") for number in range(30, 33)])
    (problem,) = fails(path, tokenizer, max_length=10, on_overlong=on_overlong).problems
    assert problem.code == "data.no-targets" and str(problem.hint).startswith("--set data.max_length=")
    needed = int(str(problem.hint).split("=")[1].split()[0])
    report = read(path, tokenizer, max_length=needed, on_overlong=on_overlong).report
    assert report.kept == 3 and report.cut_tokens == 0
    assert read(path, tokenizer, max_length=needed - 1, max_lost_share=1, on_overlong=on_overlong).report.cut_tokens > 0


def test_a_model_without_chat_template_reads_text_but_no_chats(write: Write) -> None:
    bare = ChatTokenizer(train_tokenizer(template=None))
    (problem,) = fails(write([asked("a")]), bare).problems
    assert problem.code == "data.no-chat-template" and "--set model.chat_template=FILE.jinja" in str(problem.hint)
    assert read(write([{"text": "a b c"}]), bare).report.kept == 1


def test_the_fingerprint_tells_tables_apart(write: Write, tokenizer: ChatTokenizer) -> None:
    one, two = [asked("a"), asked("b")], [asked("b"), asked("a")]
    prints = [read(write(rows), tokenizer, eval_split=0).fingerprint for rows in (one, one, two)]
    assert prints[0] == prints[1] != prints[2] and len(prints[0]) == 64
    assert read(write(one), tokenizer, eval_split=0, train_on="all").fingerprint != prints[0]


def test_a_file_to_evaluate_on_leaves_all_rows_for_training(write: Write, tokenizer: ChatTokenizer) -> None:
    path, other = write([asked(f"q{n}") for n in range(10)]), write([asked("q3"), asked("new")], "eval.jsonl")
    found = read(path, tokenizer, eval_path=other)
    assert len(trained(found)) == 10 and found.evaluation is not None and len(found.evaluation) == 2
    assert (found.report.eval_rows, found.report.shared_with_eval, found.report.rows) == (2, 1, 12)
    assert found.evaluation.example(0).source == other


def test_a_split_text_stays_on_one_side(write: Write, tokenizer: ChatTokenizer) -> None:
    path = write([{"text": f"{number} " + "the cat sat on the mat " * 5} for number in range(20)])
    found = read(path, tokenizer, on_overlong="split", max_length=8, eval_split=5)
    assert found.evaluation is not None and found.report.split == 20
    assert not set(trained(found).rows.tolist()) & set(found.evaluation.rows.tolist())
    assert found.report.eval_rows == len(set(found.evaluation.rows.tolist())) and found.report.duplicates == 0


def test_more_rows_than_a_batch_keep_their_order(write: Write, tokenizer: ChatTokenizer) -> None:
    found = read(write([asked(f"q{n}") for n in range(1100)]), tokenizer)
    assert found.evaluation is not None and len(trained(found)) + len(found.evaluation) == 1100
    assert found.report.eval_rows == 32
    assert sorted([*trained(found).rows.tolist(), *found.evaluation.rows.tolist()]) == list(range(1100))


hashes = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), min_size=1, max_size=400).map(lambda values: np.array(values, np.uint64))
splits = st.just("auto") | st.floats(0, 0.99) | st.integers(1, 50)


@settings(deadline=None, max_examples=150)
@given(hashes, splits)
def test_equal_content_is_on_one_side_and_training_is_never_empty(values: np.ndarray, split: float | str) -> None:
    chosen = held_out(values, split)
    assert not set(values[chosen].tolist()) & set(values[~chosen].tolist())
    assert (~chosen).any()


@settings(deadline=None, max_examples=80)
@given(hashes, hashes, st.floats(0.01, 0.9))
def test_a_row_under_a_share_never_changes_sides_when_the_file_grows(old: np.ndarray, new: np.ndarray, share: float) -> None:
    before, after = held_out(old, share), held_out(np.concatenate((old, new)), share)[: len(old)]
    if before.sum() == (old < np.uint64(int(share * 2**64))).sum():
        assert (before <= after).all() or len(np.unique(np.concatenate((old, new)))) < 3
    assert not (after & (old >= np.uint64(int(share * 2**64)))).any()


@pytest.mark.parametrize(
    ("rows", "least", "most"), [(100, 0, 12), (319, 0, 20), (320, 32, 32), (1000, 32, 40), (4000, 40, 130), (80_000, 1000, 1000)]
)
def test_the_automatic_size(rows: int, least: int, most: int) -> None:
    values = np.random.default_rng(1).integers(0, 2**64, rows, np.uint64, endpoint=False)
    assert least <= held_out(values, "auto").sum() <= most


def test_a_count_is_that_many_of_the_smallest() -> None:
    values = np.arange(100, dtype=np.uint64)[::-1].copy()
    assert np.flatnonzero(held_out(values, 7)).tolist() == list(range(93, 100))
    assert held_out(values, 1000).sum() == 99
    assert held_out(values, 0).sum() == 0 and held_out(values[:1], 0.5).sum() == 0


def test_templates_are_part_of_what_is_prepared(write: Write, tokenizer: ChatTokenizer) -> None:
    other = ChatTokenizer(train_tokenizer(template=CHATML.replace("im_start", "endoftext")))
    path = write([asked("a")])
    assert read(path, tokenizer).fingerprint != read(path, other).fingerprint
