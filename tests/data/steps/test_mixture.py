"""A mixture is exact over every epoch, a subset changes from epoch to epoch, and a plain source keeps its order."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.order import row_at
from tests.support.tokenizers import train_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import Source, open_source
from llamahome.data.prepare import prepare
from llamahome.data.steps.mixture import MixtureSource, RowOrder, order_of, plain_order
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import ConfigError, DataError

NONE = np.empty(0, np.int64)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 40), ("b/one", 30), ("b/two", 10), ("c", 7)):
        path = Path(f"{name}.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{name} {number} is a text"}) + "\n" for number in range(count)))


def source() -> Source:
    return open_source(["a.jsonl", "b", "c.jsonl"])


def epoch(order: RowOrder, number: int, *, seed: int = 3) -> list[int]:
    size = order.epoch_rows
    return order.rows_at(np.arange(number * size, (number + 1) * size), seed=seed).tolist()


def test_an_epoch_holds_exactly_what_the_mixture_says() -> None:
    opened = source()
    order = order_of(opened, NONE, {"a.jsonl": 2, "b/*.jsonl": 0.5, "c.jsonl": "24 rows"})
    assert order.epoch_rows == 80 + 20 + 24
    for number in range(4):
        seen = Counter(epoch(order, number))
        assert [seen[row] for row in range(40)] == [2] * 40
        assert sorted(seen[row] for row in range(40, 80)) == [0] * 20 + [1] * 20
        assert sorted(seen[row] for row in range(80, 87)) == [3] * 4 + [4] * 3


def test_a_subset_changes_and_half_of_a_file_is_all_of_it_in_two_epochs() -> None:
    order = order_of(source(), NONE, {"b": 0.5})
    halves = [{row for row in epoch(order, number) if 40 <= row < 80} for number in range(6)]
    assert all(halves[number] | halves[number + 1] == set(range(40, 80)) for number in (0, 2, 4))
    assert len({frozenset(half) for half in halves}) == 6


def test_a_plain_source_and_a_mixture_of_ones_see_every_row_once() -> None:
    assert epoch(plain_order(87), 2) == [row_at(position, num_rows=87, seed=3) for position in range(174, 261)]
    assert sorted(epoch(order_of(source(), NONE, {"a.jsonl": 1}), 1)) == list(range(87))


def test_rows_held_out_are_never_seen() -> None:
    held = np.array([0, 1, 39, 41, 79, 80, 86])
    assert sorted(epoch(plain_order(87, held=held), 0)) == sorted(set(range(87)) - set(held.tolist()))
    seen = Counter(epoch(order_of(source(), held, {"a.jsonl": 3, "c.jsonl": 0}), 1))
    assert seen == {**dict.fromkeys(range(2, 39), 3), **{row: 1 for row in range(40, 80) if row not in (41, 79)}}
    assert plain_order(87, held=held).first_rows(3).tolist() == [2, 3, 4]


parts = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 70)), min_size=1, max_size=5).filter(lambda each: any(d for _, d in each))


@settings(deadline=None, max_examples=60)
@given(parts, st.integers(0, 2**63 - 1), st.integers(0, 10**12), st.data())
def test_every_epoch_is_exact_for_any_parts(sizes: list[tuple[int, int]], seed: int, number: int, data: st.DataObject) -> None:
    total = sum(rows for rows, _ in sizes)
    held = np.array(sorted(data.draw(st.sets(st.integers(0, total + 9), max_size=10))), np.int64)
    begin, made = 0, []
    for rows, draws in sizes:
        middle = data.draw(st.integers(0, rows))
        runs = tuple((first, count) for first, count in ((begin, middle), (begin + middle, rows - middle)) if count)
        made.append(MixtureSource("", runs, draws))
        begin += rows
    order = RowOrder(held, tuple(made))
    seen = Counter(epoch(order, number, seed=seed))
    kept = [row for row in range(total + len(held) + 10) if row not in set(held.tolist())]
    begin = 0
    for rows, draws in sizes:
        times = [seen[kept[row]] for row in range(begin, begin + rows)]
        assert sum(times) == draws and max(times) - min(times) <= 1
        begin += rows
    some = data.draw(st.integers(0, order.epoch_rows - 1)) + number * order.epoch_rows
    assert order.rows_at(np.array([some]), seed=seed)[0] == epoch(order, number, seed=seed)[some % order.epoch_rows]


def test_names_that_match_no_file_or_the_same_file_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        order_of(source(), NONE, {"d.jsonl": 1, "b": 2, "b/one.jsonl": 3})
    assert [problem.code for problem in caught.value.problems] == ["data.mixture-unknown", "data.mixture-twice"]
    with pytest.raises(DataError) as empty:
        order_of(source(), NONE, {"a.jsonl": 0, "b": 0, "c.jsonl": 0})
    assert empty.value.problems[0].code == "data.mixture-empty"


def test_the_mixture_is_in_the_report_and_in_the_fingerprint() -> None:
    tokenizer = ChatTokenizer(train_tokenizer())

    def opened(**settings: object) -> tuple[list[str], str, int]:
        found = prepare(DataConfig(eval_split=0, **settings), ["a.jsonl", "c.jsonl"], tokenizer, say=lambda _: None)
        found.close()
        return found.report.lines(), found.fingerprint, found.report.epoch_rows

    plain, mixed = opened(), opened(mixture={"c.jsonl": 2})
    assert "c.jsonl: 7 rows, 14 seen in an epoch (2 times each)" in mixed[0] and plain[1] != mixed[1]
    assert (plain[2], mixed[2]) == (47, 54)
