"""The statistics of data equal those counted by hand."""

import json
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.projects import chats
from tests.support.tokenizers import save_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, look_over
from llamahome.data.checks.row_sizes import LENGTHS
from llamahome.data.checks.stats import Stats, example_lengths, histogram, padding_share, stats_of
from llamahome.data.prepare import prepare
from llamahome.data.text.tokens import load_tokenizer

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@pytest.fixture(autouse=True)
def _model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "model")


def figures(rows: list[dict[str, Any]], **data: Any) -> Stats:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(**data)
    side = look_over(Request(("rows.jsonl",), config, ("model", None)), lambda found: None)
    assert side is not None
    return stats_of(side, config, languages=False)


def long_chats(*words: int) -> list[dict[str, Any]]:
    rows = chats(len(words))
    for row, count in zip(rows, words, strict=True):
        row["messages"][1]["content"] = "the cat sat " * (count // 3) + "end"
    return rows


def long_pairs(*words: tuple[int, int]) -> list[dict[str, Any]]:
    """Pairs whose better and worse answers have about these numbers of words."""
    return [
        {"prompt": f"{n}: where?", "chosen": "the cat sat " * (better // 3) + "end", "rejected": "the mat " * (worse // 2) + "no"}
        for n, (better, worse) in enumerate(words)
    ]


@settings(deadline=None, max_examples=60)
@given(lengths, st.integers(1, 5))
def test_the_padding_is_the_mean_over_all_batches_there_are(values: list[int], batch: int) -> None:
    taken = min(batch, len(values))
    batches = list(combinations(values, taken))
    padded = sum(taken * max(one) for one in batches)
    real = sum(map(sum, batches))
    assert padding_share(np.array(values), batch) == pytest.approx(1 - real / padded)


def test_rows_of_one_length_need_no_padding_and_no_rows_none() -> None:
    assert padding_share(np.full(100, 7), 8) == pytest.approx(0)
    assert padding_share(np.empty(0, np.int64), 8) == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5000), max_size=30))
def test_each_length_is_in_one_stretch_of_the_histogram(values: list[int]) -> None:
    bins = histogram(values)
    assert sum(found.rows for found in bins) == len(values) and sum(found.tokens for found in bins) == sum(values)
    assert all(one.end == other.begin for one, other in pairwise(bins))
    for found in bins:
        assert found.rows == sum(found.begin <= value < found.end for value in values)
    assert not bins or bins[-1].rows > 0


@settings(deadline=None, max_examples=60)
@given(lengths, st.integers(8, 30))
def test_lengths_of_examples_are_those_of_rows_cut_left_out_or_split(values: list[int], limit: int) -> None:
    array = np.array(values)
    assert sorted(example_lengths(array, DataConfig(max_length=limit))) == sorted(min(value, limit) for value in values)
    dropped = example_lengths(array, DataConfig(max_length=limit, on_overlong="drop"))
    assert sorted(dropped) == sorted(value for value in values if value <= limit)
    split = example_lengths(array, DataConfig(max_length=limit, on_overlong="split"))
    assert split.sum() == sum(values) and split.max() <= limit


@pytest.mark.parametrize("on_overlong", ["truncate", "drop"])
def test_an_epoch_is_what_training_makes_of_the_rows(on_overlong: str) -> None:
    data: dict[str, Any] = {"max_length": 200, "on_overlong": on_overlong, "max_lost_share": 1.0, "eval_split": 0}
    found = figures(long_chats(9, 30, 90, 300), **data)
    report = prepare(DataConfig(**data), "rows.jsonl", load_tokenizer("model"), say=lambda _: None).report
    assert (found.epoch_examples, found.epoch_tokens, found.epoch_targets) == (report.kept, report.tokens, report.targets)
    assert found.rows == report.rows


@pytest.mark.parametrize("format_name", ["messages", "preference"])
def test_what_each_max_length_would_cut_is_what_it_cuts(format_name: str) -> None:
    """Of a pair max_length holds for each answer with its prompt."""
    rows = long_chats(9, 90, 300, 900) if format_name == "messages" else long_pairs((9, 12), (150, 120), (9, 400), (900, 300))
    found = figures(rows, format=format_name)
    assert [cut.max_length for cut in found.cuts] == list(LENGTHS)
    for cut in found.cuts[:3]:
        data = {"format": format_name, "max_length": cut.max_length, "max_lost_share": 1.0, "eval_split": 0}
        report = prepare(DataConfig(**data), "rows.jsonl", load_tokenizer("model"), say=lambda _: None).report
        assert (cut.rows, cut.tokens, cut.targets) == (report.overlong_truncated, report.cut_tokens, report.cut_targets)
    assert found.cuts[0].targets > 0 and found.cuts[-1].rows == 0


def test_totals_duplicates_and_the_longest_rows() -> None:
    rows = [*long_chats(9, 90, 300), {"messages": None}]
    found = figures([*rows, rows[1]])
    assert (found.rows, found.usable, found.duplicates) == (5, 4, 1)
    assert found.longest[0].where == "rows.jsonl:3" and found.longest[0].tokens == found.percentiles["longest"]
    assert [row.where for row in found.longest[1:3]] == ["rows.jsonl:2", "rows.jsonl:5"]
    assert found.mean == pytest.approx(found.tokens / 4) and 0 < found.targets < found.tokens
    assert found.languages is None and json.loads(json.dumps(asdict(found)))["cuts"][0]["max_length"] == 256
