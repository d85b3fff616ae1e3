"""What the user set stays. Which rows are evaluated depends on their content alone, and fewer are a subset of more."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tests.support.models import backend_named
from tests.support.projects import chats
from tests.support.tokenizers import train_tokenizer

from llamahome.config.load import LoadedConfig, load_config
from llamahome.config.schema import DataConfig
from llamahome.data.prepare import Prepared, prepare
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.resolve import evaluated_rows, held_out_tokens, resolve_amount, resolve_evaluation, with_resolved
from llamahome.training.run import Plan

BACKEND = backend_named("cpu")
ROWS = [json.dumps(row) for row in chats(90)]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer())


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prepared(rows: list[str], tokenizer: ChatTokenizer, **settings: object) -> Prepared:
    Path("rows.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return prepare(DataConfig(**{"eval_split": 40, **settings}), "rows.jsonl", tokenizer, say=lambda _: None)


def with_rows(rows: int | str) -> LoadedConfig:
    return load_config(assignments=[f"evaluation.rows={rows}"], environment={}, folder=Path())


def texts(table: ExampleTable | None, tokenizer: ChatTokenizer) -> list[str]:
    assert table is not None
    return [tokenizer.decode(table.example(number).tokens) for number in range(len(table))]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("others", [False, True])
def test_fewer_rows_are_a_subset_of_more_whatever_the_order_of_the_file(tokenizer: ChatTokenizer, *, streaming: bool, others: bool) -> None:
    other: dict[str, object] = {}
    if others:
        Path("other.jsonl").write_text("".join(f"{row}\n" for row in map(json.dumps, chats(40, seed=5))))
        other = {"eval_split": 0, "eval_path": "other.jsonl"}
    found = prepared(ROWS, tokenizer, streaming=streaming, **other)
    chosen = {rows: texts(evaluated_rows(found, with_rows(rows).config), tokenizer) for rows in (1, 7, 20, 39, 40, 1000, "all")}
    for fewer, more in ((1, 7), (7, 20), (20, 39), (39, 40)):
        assert len(chosen[fewer]) == fewer and set(chosen[fewer]) < set(chosen[more])
    assert chosen[40] == chosen[1000] == chosen["all"] == texts(found.evaluation, tokenizer), "as they stand in the file"
    assert chosen[7] == [text for text in chosen["all"] if text in chosen[7]]
    if others:
        Path("other.jsonl").write_text("".join(f"{line}\n" for line in reversed(Path("other.jsonl").read_text().splitlines())))
    again = prepared(random.Random(1).sample(ROWS, len(ROWS)), tokenizer, streaming=streaming, **other)
    assert sorted(texts(evaluated_rows(again, with_rows(7).config), tokenizer)) == sorted(chosen[7])
    found.close()
    again.close()


def test_tokens_come_in_the_order_of_selection_without_rows_that_teach_nothing(tokenizer: ChatTokenizer) -> None:
    long = [
        json.dumps({"messages": [{"role": "user", "content": "the cat " * 400}, {"role": "assistant", "content": f"{n}"}]})
        for n in range(9)
    ]
    settings = {"max_length": 60, "max_lost_share": 1, "on_overlong": "drop"}
    found = prepared([*ROWS, *long], tokenizer, eval_split=80, **settings)
    tokens = held_out_tokens(found)
    assert found.evaluation is not None and 0 < len(tokens) < found.evaluation.num_rows
    for rows in (1, 5, len(tokens)):
        table = evaluated_rows(found, with_rows(rows).config)
        assert table is not None and len(table) == rows and len(table.tokens) == np.sum(tokens[:rows])
    found.close()


def test_without_held_out_rows_there_is_nothing_to_evaluate(tokenizer: ChatTokenizer) -> None:
    found = prepared(ROWS, tokenizer, eval_split=0)
    assert evaluated_rows(found, with_rows("auto").config) is None and len(held_out_tokens(found)) == 0
    found.close()


@pytest.mark.parametrize(
    ("typed", "begun", "rows"),
    [
        ([], False, 16),
        ([], True, "all"),  # by an earlier version, which saved no such setting
        (["evaluation.rows=auto"], True, 16),
        (["evaluation.rows=all"], False, "all"),
        (["evaluation.rows=3"], True, 3),
        (["evaluation.every=10 min"], False, 16),
    ],
)
def test_what_was_set_stays_and_a_run_that_began_with_all_rows_continues_with_all(
    tokenizer: ChatTokenizer, typed: list[str], begun: bool, rows: int | str
) -> None:
    found, lines = prepared(ROWS, tokenizer), list[str]()
    plan = Plan(horizon=10, positions=20, steps_per_epoch=5, rows_ahead=10 if begun else 20)
    loaded = load_config(assignments=typed, environment={}, folder=Path())
    resolved = with_resolved(loaded, resolve_evaluation(loaded, found, plan, BACKEND, say=lines.append))
    assert resolved.config.evaluation.rows == rows and resolved.config.evaluation.every != "auto"
    assert len(lines) == (rows == 16) and all("16 of 40 held-out rows" in line for line in lines)
    longer = Plan(10**6, 10**9, 5, 10**6)
    assert resolve_evaluation(resolved, found, longer, BACKEND, say=lines.append) == {}, "what is resolved stays"
    found.close()


@pytest.mark.parametrize("typed", [[], ["training.epochs=3"], ["training.batch_size=4"]])
def test_the_line_about_passes_says_what_max_steps_leaves_of_them(tokenizer: ChatTokenizer, typed: list[str]) -> None:
    found, lines = prepared(ROWS, tokenizer), list[str]()
    training = load_config(assignments=["training.max_steps=2", *typed], environment={}, folder=Path()).config.training
    resolve_amount(training, found, say=lines.append)
    assert lines[0].startswith("50 rows: 0.16 passes, 2 steps of 4 rows, because training.max_steps is 2"), lines
    found.close()
