"""Files of different formats are refused together, with what each holds and the command for each."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.projects import chats, labelled, pairs, write_rows

from llamahome.data.files.sources import open_source
from llamahome.data.prepare import first_format
from llamahome.errors import DataError, Problem

ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": chats(100),
    "alpaca": [{"instruction": f"count to {number}", "output": "one"} for number in range(100)],
    "preference pairs (chosen, rejected)": pairs(100),
    "answers labelled good or bad (completion, label)": labelled(100),
}
OPTIONS = ("", "", " --set training.objective=dpo", " --set training.objective=kto")


def refusal(folder: Path) -> Problem:
    with pytest.raises(DataError) as caught:
        first_format(open_source(str(folder)), "auto")
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("size", [3, 100])
@pytest.mark.parametrize("kinds", [*itertools.product(range(4), repeat=2), (0, 1, 2), (2, 0, 0), (3, 1, 3)])
def test_each_format_is_named_with_its_files_and_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, kinds: tuple[int, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, kind in enumerate(kinds):
        write_rows(Path(f"{number}.jsonl"), list(ROWS.values())[kind][:size])
    if len(set(kinds)) == 1:
        if kinds[0] < 2:
            assert first_format(open_source("."), "auto").name == list(ROWS)[kinds[0]]
        else:
            assert refusal(Path()).code == "data.preference"
        return
    problem = refusal(Path())
    assert problem.code == "data.mixed-formats"
    for kind in set(kinds):
        files = [f"{number}.jsonl" for number, each in enumerate(kinds) if each == kind]
        assert f"{', '.join(files)}: {list(ROWS)[kind]}" in problem.message
        assert f"llamahome train {' '.join(files)}{OPTIONS[kind]}" in str(problem.hint).split("; ")


def test_many_files_of_a_format_are_counted_and_no_command_names_them(tmp_path: Path) -> None:
    for number in range(6):
        write_rows(tmp_path / f"{number}.jsonl", ROWS["messages" if number else "alpaca"][:2])
    problem = refusal(tmp_path)
    assert "3.jsonl and 2 more: messages" in problem.message and problem.hint == "a folder for the files of each format"


def test_files_in_other_spellings_of_the_first_format_are_read_with_it(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    write_rows(tmp_path / "a.jsonl", ROWS["messages"])
    write_rows(tmp_path / "b.jsonl", [{"conversations": turns}])
    assert first_format(open_source(str(tmp_path)), "auto").name == "messages"
    write_rows(tmp_path / "a.jsonl", [{"prompt": "What?", "completion": "That."}] * 100)
    write_rows(tmp_path / "b.jsonl", ROWS["alpaca"])
    assert first_format(open_source(str(tmp_path)), "auto").name == "prompt_completion"


def test_tables_with_equal_columns_are_read_once(tmp_path: Path) -> None:
    for number, rows in enumerate((ROWS["messages"], ROWS["messages"], ROWS["alpaca"])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
    source = open_source(str(tmp_path))
    assert [rows[0].source for rows in source.beginnings(files=9, rows=2)] == [str(tmp_path / f"{number}.parquet") for number in (0, 2)]
    assert "2.parquet: alpaca" in refusal(tmp_path).message


def test_a_chosen_format_and_files_in_no_format_are_left_to_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS["messages"][:2])
    write_rows(tmp_path / "b.jsonl", [{"odd": 1}])
    assert first_format(open_source(str(tmp_path)), "auto").name == "messages"
    write_rows(tmp_path / "b.jsonl", ROWS["alpaca"])
    assert first_format(open_source(str(tmp_path)), "messages").name == "messages"
