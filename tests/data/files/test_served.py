"""What a server sent instead of a file of rows is named as what it is: pages, XML, messages of errors; rows that look alike are read."""

import gzip
from pathlib import Path

import pytest

from llamahome.data.files.sources import open_source
from llamahome.errors import DataError, Problem

PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in to a hub</title></head>\n<body>x</body></html>\n"
PAGES = {
    "a page": (PAGE, 'a web page ("Sign in to a hub")'),
    "after a mark, blank lines and a comment": ("\ufeff\n\n <!-- x -->\n<HTML lang='en'><body>404</body></HTML>", "a web page"),
    "XHTML": ('<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">\n<html><title>Oh</title></html>', 'a web page ("Oh")'),
    "XML": ('<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>\n', "XML (<Error>)"),
}
MESSAGES = {
    "hugging face": ('{"error":"Invalid username or password."}', "Invalid username or password."),
    "github": ('{"message":"Not Found","documentation_url":"https://docs","status":"404"}', "Not Found"),
    "over lines": ('{\n  "error": {\n    "code": 401,\n    "message": "No access"\n  }\n}\n', "No access"),
    "a list": ('{"detail": [{"msg": "field required", "type": "missing"}]}', "field required"),
    "plain": ("404: Not Found", "404: Not Found"),
    "gated": ("Access to dataset a/b is restricted. You must be authenticated to access it.\n", "Access to dataset a/b is restricted."),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(name: str, content: str) -> Problem:
    packed = name.endswith(".gz")
    Path(name).write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    with pytest.raises(DataError) as raised:
        open_source(name)
    (problem,) = raised.value.problems
    return problem


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows", "rows.jsonl.gz"])
@pytest.mark.parametrize("case", PAGES)
def test_a_page_under_the_name_of_rows_is_called_a_page(name: str, case: str) -> None:
    content, what = PAGES[case]
    problem = refusal(name, content)
    assert problem.code == "data.other-kind" and what in problem.message
    assert "download the file itself again" in str(problem.hint)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.csv.gz"])
def test_a_page_under_the_name_of_a_table_or_an_archive_is_called_a_page(name: str) -> None:
    Path(name).write_text(PAGE)
    with pytest.raises(DataError) as raised:
        open_source(name)
    assert "a web page" in raised.value.problems[0].message and "download" in str(raised.value.problems[0].hint)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("case", MESSAGES)
def test_the_message_of_an_error_is_quoted_and_never_offered_as_a_text_to_learn(name: str, case: str) -> None:
    content, message = MESSAGES[case]
    problem = refusal(name, content)
    assert problem.code == "data.other-kind" and f'an error message of a server ("{message}' in problem.message
    assert "data.columns" not in str(problem.hint)


def test_xml_that_is_no_error_is_not_blamed_on_a_download() -> None:
    problem = refusal("rows.jsonl", '<rows><row question="a" answer="b"/></rows>\n')
    assert "XML (<rows>)" in problem.message and "one JSON object a line" in str(problem.hint)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", '{"text": "404: Not Found is what the page says"}\n', 1),
        ("a.jsonl", '{"prompt": "Access is forbidden?", "completion": "<html>"}\n', 1),
        ("a.jsonl", '{"message": "not found", "text": "a"}\n', 1),
        ("a.jsonl", '{"error": "not found"}\n{"error": "forbidden"}\n', 2),
        ("a.csv", "prompt,completion\n<html>,a page is not found\n", 1),
        ("a.csv", "<b>,completion\nx,y\n", 1),
        ("a.txt", "The page was not found.\n", 1),
        ("a.md", "<html> begins a page.\n", 1),
    ],
)
def test_rows_about_pages_and_errors_are_rows(name: str, content: str, rows: int) -> None:
    Path(name).write_text(content)
    assert len(open_source(name)) == rows
