"""A file is followed record by record, whatever happens to it; thinned curves keep their spikes."""

import json
import math
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.monitoring.series import Cursor, read_from, thin


@given(cuts=st.lists(st.integers(0, 400), max_size=12), count=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_every_record_is_read_once_wherever_the_writer_is_interrupted(tmp_path_factory, cuts: list[int], count: int) -> None:
    path = tmp_path_factory.mktemp("follow") / "metrics.jsonl"
    content = b"".join(json.dumps({"step": step, "text": "zeile\u00e4"}).encode() + b"\n" for step in range(count))
    found, cursor = [], Cursor()
    for end in [*sorted(min(cut, len(content)) for cut in cuts), len(content)]:
        path.write_bytes(content[:end])
        read = read_from(path, cursor)
        assert not read.restarted and not read.damaged and not read.more
        found += [record["step"] for record in read.records]
        cursor = read.cursor
    assert found == list(range(count))


def test_a_file_that_was_cut_or_replaced_is_read_from_its_start_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    first = read_from(path)
    with path.open("r+") as file:
        file.truncate(12)
    cut = read_from(path, first.cursor)
    assert cut.restarted and [record["step"] for record in cut.records] == [1]
    (tmp_path / "other").write_text('{"step": 1}\n{"step": 7}\n{"step": 8}\n')
    (tmp_path / "other").replace(path)
    replaced = read_from(path, cut.cursor)
    assert replaced.restarted and [record["step"] for record in replaced.records] == [1, 7, 8]
    path.unlink()
    assert read_from(path, replaced.cursor).restarted


def test_lines_that_are_not_records_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n\n{"step": 2}\n{"st')
    read = read_from(path)
    assert [record["step"] for record in read.records] == [1, 2] and read.damaged == 2
    assert read_from(path, read.cursor).records == []


@given(
    y=st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), min_size=1, max_size=600), points=st.integers(2, 300)
)
@settings(max_examples=100, deadline=None)
def test_a_thinned_curve_keeps_its_ends_its_extremes_and_its_gaps(y: list[float | None], points: int) -> None:
    x, values = thin(list(range(len(y))), y, points)
    known = [value for value in y if value is not None and math.isfinite(value)]
    kept = [value for value in values if value is not None]
    assert len(x) == len(values) <= max(points, 4) + 2 and x == sorted(set(x)) and x[0] == 0 and x[-1] == len(y) - 1
    assert [max(kept), min(kept)] == [max(known), min(known)] if known else not kept
    assert (None in values) == (len(known) < len(y))
    assert all(value == y[int(at)] for at, value in zip(x, values, strict=True) if value is not None)
