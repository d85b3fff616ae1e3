"""`data sample` and `data show` as a user types them."""

import email
import json
import shutil
import signal
import subprocess
import sys
import sysconfig
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from tests.support.tokenizers import save_tokenizer, train_tokenizer

from llamahome.cli.data import data_app, print_row
from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import open_source
from llamahome.data.prepare import read_all
from llamahome.data.text.tokens import ChatTokenizer, load_tokenizer
from llamahome.data.view import ShownRow, view
from llamahome.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "model")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(data_app, list(words))


def rows_file(count: int = 5, *, long: int = 1) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n} 🙂" * long}]}
        for n in range(count)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "rows.jsonl"


def shown(*words: str) -> list[dict[str, Any]]:
    result = run("show", *words, "--model", "model", "--json")
    assert result.exception is None, result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.medium
def test_sample_writes_where_it_is_told_and_does_not_overwrite(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = {"stdlib": str(Path(email.__file__).parent)}  # a small part of the library, for speed
    monkeypatch.setattr(sysconfig, "get_paths", lambda: library)
    assert run("sample", "--rows", "3").exit_code == 0
    default = scratch / "data/training/raw/docstrings.jsonl"
    assert len(default.read_text().splitlines()) == 3
    refused = run("sample", "--rows", "4").exception
    assert isinstance(refused, UsageError) and "--force" in str(refused)
    assert len(default.read_text().splitlines()) == 3
    assert run("sample", "--rows", "4", "--force").exit_code == 0
    assert len(default.read_text().splitlines()) == 4
    shutil.copytree(default.parent, scratch / "folder")
    (scratch / "folder/docstrings.jsonl").unlink()
    assert "folder/docstrings.jsonl" in run("sample", "folder", "--rows", "1").stdout
    for wrong in ("0", "-3", "many", "1.5"):
        refused = run("sample", "other", "--rows", wrong).exception
        assert isinstance(refused, UsageError) and "--rows auto" in str(refused) and not (scratch / "other").exists()
    sized = run("sample", "other", "--rows", "auto").stdout.splitlines()
    assert (
        len(sized) == 2
        and "GFLOP/s" in sized[0]
        and sized[1].split()[0] == str(len((scratch / "other/docstrings.jsonl").read_text().splitlines()))
    )


def test_json_is_one_object_a_row_in_the_order_of_the_file(scratch: Path) -> None:
    found = shown(rows_file(5), "-n", "200")
    assert [(row["row"], row["source"]) for row in found] == [(n, "rows.jsonl") for n in range(5)]
    for number, row in enumerate(found):
        assert all(set(token) == {"id", "text", "target"} for token in row["tokens"])
        text = "".join(token["text"] for token in row["tokens"])
        assert text == f"<|im_start|>user\nquestion {number}<|im_end|>\n<|im_start|>assistant\nanswer {number} 🙂<|im_end|>\n"
        learned = "".join(token["text"] for token in row["tokens"] if token["target"])
        assert learned == f"answer {number} 🙂<|im_end|>"
    assert len(shown("rows.jsonl")) == 3
    assert [row["row"] for row in shown("rows.jsonl", "--row", "4")] == [4]
    assert [row["row"] for row in shown("rows.jsonl", "--row", "4, 0-2,1")] == [4, 0, 1, 2]


def test_cut_tokens_are_shown_as_cut_and_never_as_targets() -> None:
    (row,) = shown(rows_file(1, long=9), "--set", "data.max_length=30")
    assert all("cut" not in token for token in row["tokens"][:30])
    assert all(token["cut"] is True and token["target"] is False for token in row["tokens"][30:]) and len(row["tokens"]) > 30
    (dropped,) = shown("rows.jsonl", "--set", "data.max_length=30", "--set", "data.on_overlong=drop")
    assert all(token["cut"] for token in dropped["tokens"])


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_what_is_shown_is_what_is_trained_on(train_on: str) -> None:
    path = rows_file(6)
    data = DataConfig(train_on=train_on, eval_split=0)
    table = read_all(data, path, load_tokenizer("model"), say=lambda _: None).table
    for number, row in enumerate(shown(path, "-n", "6", "--set", f"data.train_on={train_on}")):
        example = table.example(number)
        assert [token["id"] for token in row["tokens"]] == example.tokens.tolist()
        assert [token["target"] for token in row["tokens"]] == example.targets.tolist()


def test_bad_rows_are_told_after_the_good_ones() -> None:
    path = rows_file(2)
    Path(path).write_text("nonsense\n" + Path(path).read_text())
    result = run("show", path, "--model", "model", "--json")
    assert isinstance(result.exception, DataError) and "rows.jsonl:1" in str(result.exception)
    assert [json.loads(line)["row"] for line in result.stdout.splitlines()] == [1, 2]


@pytest.mark.parametrize(("rows", "said"), [("2", "0 to 1"), ("0-5", "0 to 1"), ("0,x", "'x' is neither"), ("1-", "'1-' is neither")])
def test_a_row_that_is_not_there_is_a_usage_error(rows: str, said: str) -> None:
    result = run("show", rows_file(2), "--row", rows, "--model", "model")
    assert isinstance(result.exception, UsageError) and said in str(result.exception)


def printed(*, colour: bool) -> str:
    source = open_source(rows_file(1, long=3))
    (row,) = view(source, range(1), DataConfig(max_length=30), ChatTokenizer(train_tokenizer()))
    assert isinstance(row, ShownRow)
    out = StringIO()
    print_row(row, Console(file=out, force_terminal=colour, color_system="standard" if colour else None, width=300, highlight=False))
    return out.getvalue()


def test_without_colour_marks_and_a_legend_tell_the_mask() -> None:
    text = printed(colour=False)
    assert "rows.jsonl:1 (--row 0)" in text and "\x1b" not in text
    assert "<|im_start|>assistant\n[[answer 0" in text and "}}" in text
    assert "[[learned]]" in text and "{{cut off by data.max_length}}" in text and "context, read but not learned" in text


def test_with_colour_there_are_no_marks() -> None:
    text = printed(colour=True)
    assert "\x1b[" in text and "[[" not in text and "{{" not in text


def test_control_characters_of_the_data_do_not_reach_the_terminal() -> None:
    Path("rows.jsonl").write_text(json.dumps({"text": "a\x1b[2Jb"}))
    result = run("show", "rows.jsonl", "--model", "model")
    assert "\x1b" not in result.stdout and "\\x1b[2J" in result.stdout


def test_plain_output_is_the_default_where_there_is_no_terminal() -> None:
    result = run("show", rows_file(4), "--model", "model")
    assert result.exception is None and result.stdout.count("tokens: ") == 3 and "[[answer 1" in result.stdout


@pytest.mark.medium
def test_when_the_reader_of_a_pipe_has_enough_the_command_ends_like_a_filter(scratch: Path) -> None:
    rows_file(400)
    words = f"{sys.executable} -m llamahome data show rows.jsonl -n 400 --model model --json"
    done = subprocess.run(["bash", "-c", f"{words} | head -n 1; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True)
    first, status = done.stdout.splitlines()
    assert json.loads(first)["row"] == 0 and status == str(128 + signal.SIGPIPE) and done.stderr == ""
