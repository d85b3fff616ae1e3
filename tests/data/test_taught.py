"""What a teacher said is found by the content of an example, whatever rows are around it; what it never read is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import examples_of
from tests.support.runs import table_of

from llamahome.data.records import Example
from llamahome.data.store import taught
from llamahome.errors import DataError

TOP = 3
ABOUT = {"teacher": "big", "teacher_fingerprint": "f", "tokenizer": "t", "top_k": TOP, "data": ("rows.jsonl",), "data_fingerprint": "d"}


def values_of(examples: list[Example]) -> taught.TaughtValues:
    """Values that can be told apart: the first id of a target is its number among the targets of its example."""
    numbers = np.concatenate([np.arange(example.targets.sum()) for example in examples])
    rows = np.concatenate([np.full(example.targets.sum(), example.row) for example in examples])
    ids = np.stack([numbers, rows, rows], 1).astype(np.int32)
    return taught.TaughtValues(ids, ids.astype(np.float32), rows.astype(np.float32))


def write(folder: Path, examples: list[Example], *, part_targets: int = 40) -> list[range]:
    parts = taught.parts_of(table_of(examples), part_targets)
    for number, part in enumerate(parts):
        chosen = [examples[i] for i in part]
        taught.write_part(folder, number, chosen, values_of(chosen), stamp="s")
    targets = sum(int(example.targets.sum()) for example in examples)
    taught.finish(folder, taught.About(stamp="s", examples=len(examples), targets=targets, parts=len(parts), **ABOUT))
    return parts


def test_every_example_finds_its_own_values_in_any_order(tmp_path: Path) -> None:
    examples = examples_of([9, 30, 2, 17, 25, 40, 3])
    assert len(write(tmp_path, examples)) > 1
    found = taught.Taught(tmp_path)
    for example in reversed(examples):
        values = found.values(example)
        assert values.ids[:, 0].tolist() == list(range(int(example.targets.sum())))
        assert set(values.rest.tolist()) <= {float(example.row)}
    assert found.missing(iter(examples)) is None


def test_an_example_with_another_token_or_target_is_refused_by_its_place(tmp_path: Path) -> None:
    (example,) = examples_of([12])
    write(tmp_path, [example])
    other_token = Example(example.source, 0, 7, np.where(np.arange(12) == 5, 4, example.tokens), example.targets)
    targets = example.targets.copy()
    targets[-1] = False
    other_target = Example(example.source, 0, 7, example.tokens, targets)
    for other in (other_token, other_target):
        with pytest.raises(DataError, match=r"not-taught.*rows\.jsonl:7"):
            taught.Taught(tmp_path).values(other)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 100))
def test_parts_hold_every_example_once_and_end_when_they_are_full(lengths: list[int], part_targets: int) -> None:
    examples = examples_of(lengths)
    parts = taught.parts_of(table_of(examples), part_targets)
    assert [number for part in parts for number in part] == list(range(len(examples)))
    sizes = [[int(examples[i].targets.sum()) for i in part] for part in parts]
    assert all(sum(size) >= part_targets for size in sizes[:-1]) and all(sum(size[:-1]) < part_targets for size in sizes)


def test_an_unfinished_folder_a_torn_part_and_a_part_of_another_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no teacher\.json"):
        taught.Taught(tmp_path)
    parts = write(tmp_path, examples_of([30, 30, 30]), part_targets=10)
    path = taught.part_path(tmp_path, len(parts) - 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert not taught.is_whole(tmp_path, len(parts) - 1, stamp="s")
    with pytest.raises(DataError, match="cannot be read"):
        taught.Taught(tmp_path)
    path.write_bytes(whole.replace(b'"stamp":"s"', b'"stamp":"o"'))
    assert not taught.is_whole(tmp_path, len(parts) - 1, stamp="s")
    with pytest.raises(DataError, match="not of this teacher"):
        taught.Taught(tmp_path)
