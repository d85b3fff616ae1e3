"""A table whose first line is a row is refused for that reason, and the command in its help makes a table with names."""

import subprocess
from pathlib import Path

import pytest

from llamahome.data.files.sources import open_source
from llamahome.data.rows.detect import detect
from llamahome.errors import DataError, Problem


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problem_of(name: str, content: str, **columns: str) -> Problem:
    Path(name).write_text(content)
    with pytest.raises(DataError) as caught:
        detect([*open_source(name)], "auto", columns)
    return caught.value.problems[0]


WITHOUT_NAMES = {
    "questions": ("a.csv", "What is the capital of France?,Paris\nWhat is the capital of Norway?,Oslo\n", ["prompt", "completion"]),
    "tabs": ("a.tsv", "Who wrote it?\tA man\nWho read it?\tA woman\n", ["prompt", "completion"]),
    "labels": ("a.csv", "good thing,positive\nbad thing,negative\nold thing,positive\n", ["prompt", "completion"]),
    "an index and semicolons": ("a.csv", "1;Where is it?;Here\n2;Where are we?;There\n", ["number1", "prompt", "completion"]),
    "sentences": ("a.csv", '"I like this pan, it is good"\n"I do not like this pot, it is bad"\n', ["text"]),
    "it's a name to quote": ("it's a.csv", "How old?,Ten\nHow new?,Two\n", ["prompt", "completion"]),
}


@pytest.mark.parametrize("case", WITHOUT_NAMES)
def test_a_first_line_like_the_others_is_called_a_row_and_the_command_names_the_columns(case: str) -> None:
    name, content, columns = WITHOUT_NAMES[case]
    problem = problem_of(name, content)
    assert problem.code == "data.no-header" and problem.where == f"{name}:1"
    before = {*Path().iterdir()}
    subprocess.run(str(problem.hint).split("   ")[0], shell=True, check=True)
    (made,) = [path for path in {*Path().iterdir()} - before if path.is_file()]
    rows = [*open_source(str(made))]
    assert list(rows[0].value) == columns and len(rows) == content.count("\n")
    assert detect(rows, "auto").name in ("prompt_completion", "text")


@pytest.mark.parametrize(
    "content",
    [
        "great film,1\nbad film,0\ngood film,1\n",  # which column is the answer is not known
        "a b c?,x,y\nd e f?,z,y\n",
        "\ufeffWho?,He\nWhere?,There\n",
    ],
)
def test_where_no_name_is_certain_no_command_is_offered(content: str) -> None:
    problem = problem_of("a.csv", content)
    assert problem.code == "data.no-header" and str(problem.hint).startswith("write the names of the columns")


def test_a_setting_that_names_columns_of_a_table_without_names_is_told_the_same() -> None:
    content = WITHOUT_NAMES["questions"][1]
    assert problem_of("a.csv", content, prompt="question", completion="answer").code == "data.no-header"


@pytest.mark.parametrize(
    "content",
    [
        "label,x\npositive,hello there\nnegative,bad thing\n",
        "What is your name?,Why did you come?\nMary,Because of the rain\nJohn,For lunch\n",
        "bonjour,hello\nmerci,thanks\n",
    ],
)
def test_names_that_no_format_knows_are_not_taken_for_a_row(content: str) -> None:
    problem = problem_of("a.csv", content)
    assert problem.code == "data.unknown-format" and "the first line of the file names them" in problem.message


def test_a_table_with_questions_as_names_is_read_with_a_mapping() -> None:
    Path("a.csv").write_text("What is your name?,And why?\nMary?,Because?\n")
    assert detect([*open_source("a.csv")], "auto", {"prompt": "What is your name?", "completion": "And why?"}).name == "prompt_completion"


@pytest.mark.parametrize("content", ["bonjour,hello\nmerci,thanks\n", "one;un\ntwo;deux\nthree;trois\n"])
def test_short_pairs_that_may_have_no_names_are_told_how_to_write_them(content: str) -> None:
    problem = problem_of("a.csv", content)
    command = str(problem.hint).rpartition("; ")[2].partition("   ")[0]
    assert problem.code == "data.unknown-format" and command.startswith("printf") and "if the first line is a row" in str(problem.hint)
    subprocess.run(command, shell=True, check=True)
    rows = [*open_source("a-named.csv")]
    assert len(rows) == content.count("\n") and detect(rows, "auto").name == "prompt_completion"


@pytest.mark.parametrize("content", ["question,antwort\nwho,he\n", "a,b,c\nd,e,f\n"])
def test_no_names_are_offered_to_a_table_that_has_some_or_whose_answer_is_not_clear(content: str) -> None:
    assert "printf" not in str(problem_of("a.csv", content).hint)


def test_where_columns_are_named_by_a_setting_it_is_said_that_the_first_line_is_no_row() -> None:
    Path("a.csv").write_text("bonjour,hello\nmerci,thanks\n")
    Path("b.csv").write_text("prompt,hello\nmerci,thanks\n")
    said = "the first line names the columns and is no row"
    assert detect([*open_source("a.csv")], "auto", {"prompt": "bonjour", "completion": "hello"}).reason.endswith(said)
    assert said not in detect([*open_source("b.csv")], "auto", {"prompt": "prompt", "completion": "hello"}).reason
