"""The targets that max_length cuts are counted exactly, a run stops before it loses many, and the hint helps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.tokenizers import train_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.prepare import Prepared, prepare
from llamahome.data.report import DataReport
from llamahome.data.store.truncation import Truncation
from llamahome.data.text.targets import Encoded
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import DataError, Problem

Write = Callable[[list[Any]], str]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(rows: list[Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return _write


def asked(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def read(path: str, tokenizer: ChatTokenizer, **settings: Any) -> Prepared:
    return prepare(DataConfig(**{"eval_split": 0, **settings}), path, tokenizer, say=lambda _: None)


def stopped(path: str, tokenizer: ChatTokenizer, **settings: Any) -> Problem:
    with pytest.raises(DataError) as caught:
        read(path, tokenizer, **settings)
    assert caught.value.exit_status == 3
    (problem,) = caught.value.problems
    assert problem.code == "data.too-much-lost"
    return problem


ROWS = [*(asked("a", "the " * 20) for _ in range(20)), asked("b", "the " * 900), asked("c", "the " * 300)]


def lost_share(report: DataReport) -> float:
    """Share of all targets that were cut off or left out."""
    return report.cut_targets / (report.cut_targets + report.targets)


@pytest.mark.parametrize("on_overlong", ["truncate", "drop"])
def test_a_run_stops_before_it_loses_much_and_every_hint_mends_it(write: Write, tokenizer: ChatTokenizer, on_overlong: str) -> None:
    path = write(ROWS)
    settings = {"max_length": 200, "on_overlong": on_overlong}
    problem = stopped(path, tokenizer, **settings)
    whole = read(path, tokenizer, max_length=4096).report
    assert whole.longest_where == f"{path}:21" and f"({path}:21)" in problem.message and "2 rows are longer" in problem.message
    hint = str(problem.hint)
    enough = int(hint.split("data.max_length=")[1].split()[0])
    all_of_it = int(hint.split(" keeps all")[0].split()[-1].split("=")[-1])
    accepted = float(hint.split("data.max_lost_share=")[1].split()[0])
    assert 200 < enough <= all_of_it == whole.longest_tokens
    assert read(path, tokenizer, **{**settings, "max_length": all_of_it}).report.cut_tokens == 0
    mended = read(path, tokenizer, **{**settings, "max_length": enough}).report
    assert lost_share(mended) <= 0.05
    assert stopped(path, tokenizer, **{**settings, "max_length": enough - 64 if on_overlong == "truncate" else all_of_it - 1})
    report = read(path, tokenizer, **settings, max_lost_share=accepted).report
    assert report.cut_targets + report.targets == whole.targets
    assert f"{report.cut_targets:,} of them targets" in "\n".join(report.lines())
    assert stopped(path, tokenizer, **settings, max_lost_share=round(lost_share(report) - 0.001, 4))


def test_little_is_lost_without_a_stop(write: Write, tokenizer: ChatTokenizer) -> None:
    rows = [asked("a", "the " * 20) for _ in range(50)] + [asked("a", "the " * 50)]
    report = read(write(rows), tokenizer, max_length=50).report
    assert 0 < lost_share(report) < 0.05 and report.overlong_truncated == 1


def test_a_text_that_is_split_loses_nothing(write: Write, tokenizer: ChatTokenizer) -> None:
    path = write([{"text": "the " * 200}, {"text": "the cat"}])
    assert read(path, tokenizer, max_length=16, on_overlong="split", max_lost_share=0).report.split == 1
    assert "--set data.max_length=" in str(stopped(path, tokenizer, max_length=16, max_lost_share=0).hint)


def test_losses_of_parts_add_up_and_go_through_a_file() -> None:
    rows = [(Encoded((), 100 + n, 40, "dropped", ((128 + 64 * (n % 3), 40),)), f"f:{n}") for n in range(30)]
    rows += [(Encoded((), 10, 5, "whole"), "f:x")]
    whole, parts = Truncation(), [Truncation(), Truncation()]
    for number, (encoded, where) in enumerate(rows):
        whole.add(encoded, where)
        parts[number * 2 // len(rows)].add(encoded, where)
    for part in parts:
        assert Truncation.from_json(json.loads(json.dumps(part.as_json()))) == part
    parts[0].merge(parts[1])
    assert parts[0] == whole
    assert (whole.rows, whole.lost, whole.targets, whole.longest_where) == (30, 1200, 1205, "f:29")
    assert whole.length_that_loses(0) == 129 and whole.length_that_loses(1) == 0
