"""The loader gives the same examples per step whatever the layout, works ahead in one thread and leaves none behind."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.order import row_at

from llamahome.data.records import Example, Microbatch
from llamahome.data.steps.loader import Extent, Loader, StepBatch, make_microbatch, sequential_microbatches
from llamahome.data.steps.mixture import plain_order
from llamahome.data.store.counts import Counts
from llamahome.data.store.table import ExampleTable, RowRead, build_table


def table_of(lengths: list[int], *, seed: int = 0) -> ExampleTable:
    random = np.random.default_rng(seed)
    examples = []
    for number, length in enumerate(lengths):
        targets = random.random(length) < 0.5
        targets[0] = False
        examples.append(Example("rows.jsonl", number, number + 1, random.integers(0, 99, length).astype(np.int32), targets))
    return build_table([RowRead([example], "whole") for example in examples], ("rows.jsonl",))


def loader_of(table: ExampleTable, **settings: int) -> Loader:
    chosen = {"batch_size": 4, "micro_batch_tokens": 40, "seed": 3, "total_positions": 30} | settings
    return Loader(table, plain_order(table.num_rows), **chosen)


def documents(steps: list[StepBatch]) -> list[dict[int, list[int]]]:
    """Per step: position -> tokens of its document."""
    found = []
    for step in steps:
        parts: dict[int, list[int]] = {}
        for batch in step.microbatches:
            for key, tokens in zip(batch.keys, batch.tokens_T.split(list(batch.lengths)), strict=True):
                parts[key] = tokens.tolist()
        found.append(parts)
    return found


def merged(parts: list[list[dict[int, list[int]]]]) -> list[dict[int, list[int]]]:
    return [{key: value for rank in step for key, value in rank.items()} for step in zip(*parts, strict=True)]


LENGTHS = [5, 30, 12, 2, 50, 7, 7, 21, 9, 14, 33]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 90), st.integers(0, 20))
def test_a_step_holds_the_same_examples_for_any_layout_and_start(world_size: int, budget: int, first_step: int) -> None:
    table = table_of(LENGTHS)
    expected = [
        {key: table.example(row_at(key, num_rows=len(table), seed=3)).tokens.tolist() for key in range(begin, min(begin + 4, 30))}
        for begin in range(0, 30, 4)
    ][first_step:]
    ranks = []
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "micro_batch_tokens": budget, "start_position": 4 * first_step}
        with loader_of(table, **place) as loader:
            ranks.append(documents(list(loader)))
    assert merged(ranks) == expected


def test_a_micro_batch_is_its_documents_end_to_end() -> None:
    table = table_of(LENGTHS)
    with loader_of(table) as loader:
        for step in loader:
            for batch in step.microbatches:
                rows = [row_at(key, num_rows=len(table), seed=3) for key in batch.keys]
                examples = [table.example(row) for row in rows]
                assert list(batch.lengths) == sorted(batch.lengths, reverse=True) == [len(e.tokens) for e in examples]
                assert batch.positions_T.tolist() == [at for e in examples for at in range(len(e.tokens))]
                assert batch.num_targets == sum(int(e.targets.sum()) for e in examples)
                assert torch.equal(batch.tokens_T[batch.rows_N + 1], batch.labels_N)
                assert (batch.rows_N.diff() > 0).all() and batch.tokens_T.dtype == torch.int64
                borders = set(np.cumsum(batch.lengths).tolist())
                assert not borders & {row + 1 for row in batch.rows_N.tolist()}


def test_micro_batches_are_numbered_over_all_ranks() -> None:
    steps = [list(loader_of(table_of(LENGTHS), rank=rank, world_size=3)) for rank in range(3)]
    for step in zip(*steps, strict=True):
        numbers = [batch.index for rank in step for batch in rank.microbatches]
        assert numbers == list(range(len(numbers)))


def test_a_new_budget_holds_from_the_next_step_and_for_the_last_one_again() -> None:
    table = table_of(LENGTHS)
    with loader_of(table, micro_batch_tokens=100) as loader:
        first = next(loader)
        again, rest = loader.lay_out_again(first, 20), list(loader)
    with loader_of(table, micro_batch_tokens=100) as plain:
        expected = documents(list(plain))
    assert documents([first]) == documents([again]) == expected[:1]
    assert documents(rest) == expected[1:]
    assert all(batch.num_tokens <= 20 or len(batch.lengths) == 1 for step in [again, *rest] for batch in step.microbatches)
    assert {step.micro_batch_tokens for step in [again, *rest]} == {20}


def test_another_loader_continues_where_a_step_ends() -> None:
    table = table_of(LENGTHS)
    with loader_of(table) as loader:
        steps = list(loader)
        expected = documents(steps)
    assert [(step.begin, step.end) for step in steps] == [(begin, min(begin + 4, 30)) for begin in range(0, 30, 4)]
    with loader_of(table, start_position=steps[1].end) as loader:
        assert steps[1].end == 8 and expected[:2] + documents(list(loader)) == expected


def test_a_loader_that_does_not_lay_out_reads_every_row_once_and_delivers_nothing() -> None:
    table, read = table_of(LENGTHS), list[int]()

    class Counting:
        threads = 1

        def examples_of(self, rows: np.ndarray) -> ExampleTable:
            read.extend(rows.tolist())
            return table.examples_of(rows)

    def refuse(batch: Microbatch) -> Microbatch:
        raise AssertionError("delivered")

    order = plain_order(table.num_rows)
    sizes = {"batch_size": 4, "seed": 3, "total_positions": table.num_rows}
    with Loader(Counting(), order, micro_batch_tokens=50, **sizes, deliver=refuse, lays_out=False) as loader:
        first = next(loader)
        loader.micro_batch_tokens = 20
        steps = [first, *loader]
    assert sorted(read) == list(range(table.num_rows))
    with Loader(table, order, micro_batch_tokens=50, **sizes) as other:
        for step, laid in zip(steps, other, strict=True):
            tokens = [step.table.example(number).tokens.tolist() for number in range(len(step.table))]
            expected = [tokens for part in documents([laid]) for tokens in part.values()]
            assert sorted(tokens) == sorted(expected) and step.microbatches == [] and step.counts == laid.counts
    assert [step.micro_batch_tokens for step in steps] == [50, *[20] * (len(steps) - 1)]


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    with loader_of(table_of(LENGTHS)) as loader:
        next(loader)
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before
    loader.close()
    list(loader_of(table_of(LENGTHS)))
    assert set(threading.enumerate()) == before


def test_a_closed_loader_goes_on_where_it_was() -> None:
    table = table_of(LENGTHS)
    with loader_of(table) as loader:
        expected = documents(list(loader))
    loader = loader_of(table)
    seen = documents([next(loader)])
    loader.close()
    assert seen + documents(list(loader)) == expected


def test_an_error_in_the_thread_comes_out_at_once() -> None:
    broken = table_of(LENGTHS)
    broken.files[5] = 9  # of a file that is not there
    before = set(threading.enumerate())
    with loader_of(broken, batch_size=len(LENGTHS)) as loader, pytest.raises(IndexError):
        list(loader)
    assert set(threading.enumerate()) == before


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        loader_of(table_of([]))


@pytest.mark.parametrize(
    ("rows", "epochs", "batch_size", "max_steps", "positions", "steps"),
    [
        (10, 3, 4, None, 30, 8),
        (10, 0.5, 4, None, 5, 2),
        (10, 0.1, 4, None, 1, 1),
        (10, 0.01, 4, None, 1, 1),
        (30, 0.1, 3, None, 3, 1),
        (10, 3, 4, 2, 8, 2),
        (10, 1, 4, 100, 400, 100),
        (3, 2, 32, None, 6, 1),
    ],
)
def test_the_horizon(rows: int, epochs: float, batch_size: int, max_steps: int | None, positions: int, steps: int) -> None:
    extent = Extent(epochs=epochs, batch_size=batch_size, max_steps=max_steps)
    assert (extent.positions(rows), extent.horizon(rows)) == (positions, steps)
    for step in range(steps):  # resumed anywhere with the same batch size it is the same run
        later = Extent(epochs=epochs, batch_size=batch_size, max_steps=max_steps, step=step, consumed=step * batch_size)
        assert (later.positions(rows), later.horizon(rows)) == (positions, steps)


def test_a_run_resumed_with_another_batch_size_ends_where_it_was_to_end() -> None:
    assert Extent(epochs=3, batch_size=3, max_steps=60, step=30, consumed=60).horizon(40) == 60
    by_epochs = Extent(epochs=3, batch_size=3, step=30, consumed=60)
    assert (by_epochs.positions(40), by_epochs.horizon(40)) == (120, 50)


def test_evaluation_sees_every_example_once() -> None:
    table = table_of(LENGTHS)
    ranks = [sequential_microbatches(table, micro_batch_tokens=40, rank=rank, world_size=2) for rank in range(2)]
    seen = merged([documents([StepBatch(0, len(table), rank, 40, Counts())]) for rank in ranks])
    assert seen == [{number: table.example(number).tokens.tolist() for number in range(len(table))}]


def test_a_micro_batch_without_targets_is_possible() -> None:
    example = Example("rows.jsonl", 0, 1, np.arange(3, dtype=np.int32), np.zeros(3, np.bool_))
    batch = make_microbatch([example], keys=[0], index=0)
    assert batch.num_targets == 0 and batch.num_tokens == 3


@pytest.mark.parametrize("equal_passes", [False, True])
def test_an_epoch_holds_the_same_rows_once_on_any_number_of_ranks(equal_passes: bool) -> None:
    """Also where ranks run equally often: idle passes hold no row and no target, and come where another rank still has work."""
    table, seen = table_of(LENGTHS), []
    for world_size in (1, 2, 3, 4):
        keys, passes = [], []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size, "equal_passes": equal_passes, "total_positions": len(LENGTHS)}
            with loader_of(table, **place) as loader:
                steps = list(loader)
            keys += [key for step in steps for batch in step.microbatches for key in batch.keys]
            passes.append([len(step.microbatches) for step in steps])
            idle = [batch for step in steps for batch in step.microbatches if batch.idle]
            assert sum(batch.num_tokens + batch.num_targets + len(batch.keys) for batch in idle) == 0
            assert not (idle and world_size == 1) and (equal_passes or not idle)
        assert not equal_passes or all(each == passes[0] for each in passes)
        seen.append(sorted(keys))
    assert seen == [list(range(len(LENGTHS)))] * 4
