"""Cells of tables become what JSON would hold: text stays as it is, and nothing is guessed."""

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamahome.data.files.sources import open_source
from llamahome.data.files.table_values import BadValue, canonical, plain, row_value
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.errors import Problem


def test_values_that_json_lacks_become_text() -> None:
    assert plain(date(2026, 11, 22)) == "2026-11-22" and plain(time(7, 5)) == "07:05:00"
    assert plain(datetime(2026, 11, 22, 7, tzinfo=UTC)) == "2026-11-22T07:00:00+00:00"
    assert plain(Decimal("1.50")) == "1.50" and plain(timedelta(seconds=90)) == "0:01:30"
    assert plain("é".encode()) == "é" and plain(b"\xff\xd8") is None
    assert plain(float("nan")) is None and plain(1.5) == 1.5 and plain(True) is True
    assert plain([("a", 1), ("b", b"x")]) == {"a": 1, "b": "x"}


def test_fields_of_objects_that_are_null_are_absent_and_columns_that_are_null_stay() -> None:
    value = {"messages": [{"role": "user", "content": "x", "tool_calls": None}], "text": None}
    assert row_value(value) == {"messages": [{"role": "user", "content": "x"}], "text": None}


def test_turns_survive_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(number)}]} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.value for row in open_source(str(tmp_path / "a.parquet")) if isinstance(row, Row)] == rows
    pq.write_table(pa.Table.from_pylist([{"messages": json.dumps(row["messages"])} for row in rows]), tmp_path / "b.parquet")
    assert [row.value for row in open_source(str(tmp_path / "b.parquet")) if isinstance(row, Row)] == rows


def test_text_that_looks_like_something_else_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\n00123,true\n1e5,null\n,NaN\n 2026-11-22 ,{}\n")
    values = [row.value for row in open_source(str(tmp_path / "a.csv")) if isinstance(row, Row)]
    assert [(row["prompt"], row["completion"]) for row in values] == [
        ("00123", "true"),
        ("1e5", "null"),
        ("", "NaN"),
        (" 2026-11-22 ", "{}"),
    ]


@pytest.mark.parametrize("text", ["[1, ", '{"a": }', "[{'role': 'user'}]", '["\\ud800"]'])
def test_a_text_that_looks_like_a_list_but_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match="column messages"):
        row_value({"messages": text})


def test_canonical_json_does_not_depend_on_the_order_of_the_columns() -> None:
    assert canonical({"b": "é", "a": [1, None]}) == canonical({"a": [1, None], "b": "é"}) == '{"a":[1,null],"b":"é"}'.encode()


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"prompt": b"hi", "completion": "a", "picture": b"\xff"}, {"prompt": b"\xff\xfe", "completion": "a", "picture": b"\xff"}),
        (
            {"messages": [{"role": "user", "content": b"q"}, {"role": "assistant", "content": b"a"}]},
            {"messages": [{"role": "user", "content": b"q"}, {"role": "assistant", "content": b"\xff"}]},
        ),
    ],
)
def test_bytes_that_are_no_text_are_refused_where_a_text_is_read(
    tmp_path: Path, ending: str, good: dict[str, object], bad: dict[str, object]
) -> None:
    path, table = tmp_path / f"rows.{ending}", pa.Table.from_pylist([good, bad])
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    first, second = (row for row in open_source(str(path)) if isinstance(row, Row))
    name = "messages" if "messages" in good else "prompt_completion"
    assert isinstance(understand(first, name), Conversation)
    problem = understand(second, name)
    assert isinstance(problem, Problem) and problem.code == "data.not-utf8" and problem.where == f"{path}:row 2"
    assert f"column {next(iter(bad))} holds bytes" in problem.message
