"""Every shape in which pandas writes a table as one JSON value is recognised, and the hint's command makes its rows; rows stay rows."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llamahome.data.files.sources import open_source
from llamahome.errors import DataError, Problem

ROWS = [{"prompt": f"q{number} \"'ü", "completion": f"a{number}"} for number in range(4)]
CHATS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]} for _ in range(3)]


def shapes(rows: list[dict[str, Any]]) -> dict[str, object]:
    """As the documentation of pandas.DataFrame.to_json and to_dict shows them."""
    names = list(rows[0])
    return {
        "list": {name: [row[name] for row in rows] for name in names},
        "columns": {name: {str(number): row[name] for number, row in enumerate(rows)} for name in names},
        "index": {str(number): row for number, row in enumerate(rows)},
        "split": {"columns": names, "index": list(range(len(rows))), "data": [list(row.values()) for row in rows]},
        "table": {"schema": {"fields": [{"name": "index"}], "primaryKey": ["index"]}, "data": rows},
        "values": [list(row.values()) for row in rows],
    }


def refusal(path: Path) -> Problem:
    with pytest.raises(DataError) as raised:
        open_source(str(path))
    return raised.value.problems[0]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["rows.json", "it's rows.jsonl"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], CHATS], ids=["texts", "one", "chats"])
@pytest.mark.parametrize("shape", list(shapes(ROWS)))
def test_a_table_in_one_value_is_reported_and_the_hint_makes_rows(
    tmp_path: Path, shape: str, rows: list[dict[str, Any]], name: str, indent: int | None
) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(shapes(rows)[shape], indent=indent), encoding="utf-8")
    problem = refusal(path)
    assert problem.code == "data.whole-table"
    if shape == "values":
        assert problem.hint is None and "without the names" in problem.message
        return
    subprocess.run(str(problem.hint), shell=True, cwd=tmp_path, check=True)
    source = open_source(str(tmp_path / f"{path.stem}-rows.json"))
    assert [source.row(number).value for number in range(len(source))] == rows


@pytest.mark.parametrize(
    "row",
    [
        CHATS[0],
        {"messages": CHATS[0]["messages"], "tools": [{"type": "function"}, {"type": "function"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"messages": CHATS[0]["messages"], "tags": ["x", "y"]},
        {"prompt": "a", "completion": "b", "tags": ["x"]},
        ROWS[0],
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_of_one_row_is_no_table(tmp_path: Path, row: dict[str, object], name: str) -> None:
    (tmp_path / name).write_text(json.dumps(row))
    assert open_source(str(tmp_path / name)).row(0).value == row
