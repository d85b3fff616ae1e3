"""Tables are read with any delimiter, and columns that only count the rows are left out; a note reports both."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamahome.data.files.sources import Source, open_source
from llamahome.errors import DataError, Problem

SIGNS = [",", ";", "\t", "|", "^", "~", ":", "\x01", "\x1f"]
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=("Cs",)), min_size=1, max_size=20)
TABLES = st.lists(st.tuples(CELLS, CELLS), min_size=2, max_size=8)


def written(rows: list[tuple[str, ...]], sign: str) -> str:
    sink = io.StringIO()
    csv.writer(sink, delimiter=sign, lineterminator="\n").writerows(rows)
    return sink.getvalue()


def values(source: Source) -> list[dict[str, object]]:
    return [source.row(number).value for number in range(len(source))]


def opened(path: Path, text: str) -> Source:
    path.write_bytes(text.encode())
    return open_source(str(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(TABLES, st.sampled_from(SIGNS), st.booleans())
def test_every_usual_delimiter_is_found_and_noted(tmp_path: Path, rows: list[tuple[str, str]], sign: str, tabs: bool) -> None:
    source = opened(tmp_path / ("a.tsv" if tabs else "a.csv"), written([("prompt", "completion"), *rows], sign))
    assert values(source) == [{"prompt": one, "completion": other} for one, other in rows]
    assert bool(source.notes) == (sign != ("\t" if tabs else ","))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("quoted", [False, True])
@pytest.mark.parametrize("sign", [*SIGNS, "#", " ", "$"])
def test_the_line_of_excel_that_names_the_delimiter_is_obeyed(tmp_path: Path, sign: str, quoted: bool, mark: str) -> None:
    first = f'"sep={sign}"' if quoted else f"sep={sign}"
    body = written([("prompt", "completion"), ("one, two; three", "x"), ("2", "y\nz")], sign)
    source = opened(tmp_path / "a.csv", f"{mark}{first}\r\n{body}")
    assert values(source) == [{"prompt": "one, two; three", "completion": "x"}, {"prompt": "2", "completion": "y\nz"}]
    assert source.row(0).line == 3
    assert any("names the delimiter" in note for note in source.notes)


def test_delimiters_in_the_text_of_a_single_column_do_not_separate(tmp_path: Path) -> None:
    for text in ("text\nyes; no | maybe\na: b\n", "note: text\nx\ny: z\n"):
        source = opened(tmp_path / "a.csv", text)
        assert list(source.row(0).value) == [text.partition("\n")[0]]


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
@pytest.mark.parametrize("numbers", [range(5), [7, 3, 900, 1, 2], [0.0, 1.0, 2.0, 3.0, 4.0]])
def test_the_index_of_pandas_is_left_out_and_noted(tmp_path: Path, name: str, numbers: list[int]) -> None:
    rows = [(str(number), f"question {number}", "answer") for number in numbers]
    source = opened(tmp_path / "a.csv", written([(name, "prompt", "completion"), *rows], ","))
    assert values(source) == [{"prompt": row[1], "completion": row[2]} for row in rows]
    assert any("column 1" in note and "left out" in note for note in source.notes)


def test_empty_columns_are_left_out_and_noted(tmp_path: Path) -> None:
    source = opened(tmp_path / "a.csv", "prompt,completion,,\na,b,,\nc,d,,\n")
    assert values(source) == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert len(source.notes) == 2


@pytest.mark.parametrize("text", [",a\nx,b\ny,c\n", "a,,c\n1,2,3\n", "a,\nb,c\n"])
def test_a_column_of_text_without_a_name_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="has no name"):
        opened(tmp_path / "a.csv", text)


def test_text_far_below_in_a_column_that_was_left_out_is_not_lost(tmp_path: Path) -> None:
    rows = [(str(number), "question", "x" * 100) for number in range(2000)]
    source = opened(tmp_path / "a.csv", written([("", "prompt", "completion"), *rows, ("words", "a", "b")], ","))
    last = source.parsed(2000)
    assert isinstance(last, Problem) and "'words'" in last.message


def test_a_repeated_header_is_an_error_with_its_line(tmp_path: Path) -> None:
    for again in ("prompt,completion", "\ufeffprompt,completion", "prompt , completion"):
        source = opened(tmp_path / "rows.csv", f"prompt,completion\na,b\n{again}\nc,d\n")
        problem = source.parsed(1)
        assert isinstance(problem, Problem) and (problem.code, problem.where) == ("data.bad-csv", f"{tmp_path / 'rows.csv'}:3")
        assert values(opened(tmp_path / "one.csv", "text\na\ntext\n")) == [{"text": "a"}, {"text": "text"}]
