"""`data check`, `data stats` and the filters of `data show` as a user types them."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.support.projects import chats
from tests.support.tokenizers import save_tokenizer

from llamahome.cli.data import data_app
from llamahome.data.checks.stats import histogram, write_histogram
from llamahome.errors import ConfigError, DataError, MachineError, UsageError

MODEL = ("--model", "model")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "model")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(data_app, list(words))


def write(rows: list[Any], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))
    return name


def answer(text: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}]}


def test_the_exit_status_is_that_of_training() -> None:
    good, warned, bad = write(chats(3)), write([answer("a"), answer("a")], "warned.jsonl"), write([answer(None)], "bad.jsonl")
    assert [run("check", path, *MODEL).exit_code for path in (good, warned, bad)] == [0, 0, 3]
    assert run("check", bad, *MODEL, "--json").exit_code == 3
    assert run("check", "none.jsonl", *MODEL).exit_code == 3


def test_findings_are_blocks_on_stderr_and_counts_are_on_stdout() -> None:
    result = run("check", write([*chats(2), "nonsense", answer("a"), answer("a")]), *MODEL, "--no-quality")
    assert "error[data.bad-json]: rows.jsonl:3: not valid JSON" in result.stderr and "   3 | nonsense" in result.stderr
    assert "warning[data.duplicate]: rows.jsonl:5: " in result.stderr
    assert "--fix clean.jsonl" in result.stderr.splitlines()[-1]
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["1", "error", "data.bad-json", "first:", "rows.jsonl:3"]
    assert "5 rows in 1 file, format messages, 1 cannot be used" in result.stdout and "1 error and 1 warning" in result.stdout
    assert "--no-quality" in lines[-1] or "llamahome[quality]" in lines[-1]


def test_skipped_files_and_how_files_are_read_are_reported() -> None:
    Path("folder").mkdir()
    Path("folder/rows.csv").write_text("prompt;completion\na;b\n")
    Path("folder/rows.xlsx").write_text("")
    out = run("check", "folder", *MODEL).stdout
    assert "separated by a semicolon" in out and "1 data file not read: folder/rows.xlsx" in out


def test_twenty_of_a_kind_are_shown_and_json_has_all() -> None:
    path = write(["x"] * 25 + [answer("a")])
    shown = run("check", path, *MODEL)
    assert shown.stderr.count("error[data.bad-json]") == 20 and "and 5 more of data.bad-json" in shown.stderr
    lines = [json.loads(line) for line in run("check", path, *MODEL, "--json").stdout.splitlines()]
    assert [line["line"] for line in lines] == list(range(1, 26))
    assert set(lines[0]) == {"level", "code", "where", "source", "line", "row", "path", "message", "excerpt", "hint"}


def test_a_clean_result_is_reported_and_needs_no_model_without_tokens() -> None:
    result = run("check", write(chats(3)), "--no-tokens", "--model", "there/is/none")
    assert result.exit_code == 0 and "nothing is wrong" in result.stdout and result.stderr == ""


def test_settings_apply_and_invalid_ones_are_refused() -> None:
    path = write([answer("a b c"), answer(None)])
    assert run("check", path, *MODEL, "--set", "data.on_bad_row=skip", "--set", "data.max_bad_share=0.5").exit_code == 0
    assert isinstance(run("check", path, *MODEL, "--set", "data.eval_split=0.1", "--eval-data", path).exception, ConfigError)


def test_the_evaluation_data_is_compared() -> None:
    rows = chats(4)
    result = run("check", write(rows), "--eval-data", write(rows[2:], "eval.jsonl"), *MODEL)
    assert result.exit_code == 0 and result.stderr.count("warning[data.shared-with-eval]") == 2
    assert "2 rows to evaluate on in 1 file" in result.stdout


def test_a_cleaned_copy_is_reported_with_its_record() -> None:
    path = write([answer("a"), answer("a"), answer(None), answer("b <|im_end|>")])
    result = run("check", path, *MODEL, "--fix", "clean.jsonl")
    assert result.exit_code == 3 and "clean.jsonl: 2 rows, 1 of them repaired; 2 left out" in result.stdout
    assert "clean.jsonl.changes.jsonl: 3 changes, 1 data.control-token-in-text, 1 data.duplicate, 1 data.null-content" in result.stdout
    assert run("check", "clean.jsonl", *MODEL).exit_code == 0
    refused = run("check", path, *MODEL, "--fix", "clean.jsonl")
    assert isinstance(refused.exception, UsageError) and refused.stdout == "", "refused before anything is read"
    assert run("check", path, *MODEL, "--fix", "clean.jsonl", "--force").exit_code == 3
    mixed = run("check", write([answer("a"), {"text": "b"}], "mixed.jsonl"), *MODEL, "--fix", "unmixed.jsonl")
    assert mixed.exit_code == 3 and "unmixed.jsonl is not written" in mixed.stdout and not Path("unmixed.jsonl").exists()


def test_control_characters_of_the_data_do_not_reach_the_terminal() -> None:
    result = run("check", write(["\x1b[2J nonsense"]), *MODEL)
    assert "\x1b" not in result.stderr and "\\x1b[2J" in result.stderr


def test_stats_are_lines_for_people_and_one_object_for_programs() -> None:
    path = write([*chats(20), answer("the cat sat " * 90), "nonsense"])
    result = run("stats", path, *MODEL)
    assert result.exit_code == 0 and "1 cannot be used" in result.stdout and "█" in result.stdout
    for words in ("tokens", "lengths", "an epoch", "padding", "duplicates", "max_length", "<- data.max_length", "rows.jsonl:21"):
        assert words in result.stdout
    found = json.loads(run("stats", path, *MODEL, "--json").stdout)
    assert (found["rows"], found["usable"]) == (22, 21) and found["longest"][0]["where"] == "rows.jsonl:21"
    assert sum(one["rows"] for one in found["histogram"]) == 21


def test_stats_of_rows_that_cannot_be_understood_are_refused() -> None:
    assert isinstance(run("stats", write([{"a": 1}]), *MODEL).exception, DataError)
    assert isinstance(run("stats", "none.jsonl", *MODEL).exception, DataError)


@pytest.mark.parametrize("row", [answer(None), "nonsense", answer("a <|im_end|>"), {"messages": []}])
@pytest.mark.parametrize("count", [3, 25])
def test_stats_without_a_usable_row_are_refused_with_the_errors_of_the_check(row: Any, count: int) -> None:
    path = write([row] * count)
    checked = [json.loads(line) for line in run("check", path, *MODEL, "--json").stdout.splitlines()]
    codes = {line["code"] for line in checked if line["level"] == "error"}
    refused = run("stats", path, *MODEL)
    assert isinstance(refused.exception, DataError) and refused.stdout == ""
    assert {problem.code for problem in refused.exception.problems} == codes | ({"data.bad-rows"} if count > 20 else set())
    assert {problem.where for problem in refused.exception.problems} >= {f"{path}:1", f"{path}:3"}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="it is installed")
def test_a_picture_without_matplotlib_is_refused_with_what_installs_it() -> None:
    refused = run("stats", write(chats(2)), *MODEL, "--png", "lengths.png").exception
    assert isinstance(refused, MachineError) and "llamahome[plots]" in str(refused) and not Path("lengths.png").exists()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the extra `plots` is not installed")
def test_a_picture_of_the_lengths_is_a_png() -> None:
    result = run("stats", write(chats(30)), *MODEL, "--png", "lengths.png")
    assert result.exit_code == 0 and Path("lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MachineError):
        write_histogram(histogram([1, 2]), Path("no/such/folder.png"), max_length=8, title="rows")


def shown(*words: str) -> list[int]:
    result = run("show", "rows.jsonl", *words, *MODEL, "--json", "--set", "data.max_length=40")
    assert result.exception is None, result.exception
    return [json.loads(line)["row"] for line in result.stdout.splitlines()]


def test_show_filters_rows() -> None:
    question = {"messages": [{"role": "user", "content": "the cat sat " * 30}, {"role": "assistant", "content": "No."}]}
    write([answer("a"), answer("the cat sat " * 20), question, answer("b"), answer("the cat sat " * 40), "nonsense"])
    assert shown("--longest", "-n", "2") == [4, 2]
    assert shown("--cut") == [1, 2, 4] and shown("--cut", "-n", "1") == [1]
    assert shown("--no-target") == [2]
    assert shown("--row", "3") == [3] and shown("-n", "2") == [0, 1]
    told = run("show", "rows.jsonl", "--cut", "-n", "9", *MODEL, "--set", "data.max_length=40")
    assert told.exit_code == 0 and "1 row that cannot be used not shown: llamahome data check rows.jsonl" in told.stderr
    refused = run("show", "rows.jsonl", "--cut", "--longest", *MODEL).exception
    assert isinstance(refused, UsageError) and "--longest and --cut" in str(refused)


def test_a_copy_is_offered_only_where_it_would_be_better() -> None:
    twice = [answer("a"), answer("a")]
    offered = {
        "some rows are left": [*chats(3), answer(None)],
        "all can be mended": [{"messages": [{"role": "user", "content": "Count."}, {"role": "asistant", "content": "a"}]}],
        "a row says the same": twice,
    }
    for name, rows in offered.items():
        assert "--fix clean.jsonl" in run("check", write(rows), *MODEL, "--no-quality").stderr, name
    refused = {
        "nothing is left": [answer(None), answer("")],
        "only a person knows": [*chats(3), answer("what was meant \ufffd")],
        "of no format": [{"a": "b"}],
        "nothing is wrong": chats(3),
    }
    for name, rows in refused.items():
        assert "--fix clean" not in run("check", write(rows), *MODEL, "--no-quality").stderr, name
    assert "--fix clean" not in run("check", write(chats(3)), "--eval-data", write([answer(None), answer("b")], "e.jsonl"), *MODEL).stderr
    Path("clean.jsonl").touch()
    assert "--fix clean-2.jsonl" in run("check", write(twice), *MODEL, "--no-quality").stderr, "that name is free"


def test_the_suggested_command_that_takes_rows_out_of_an_object_works() -> None:
    Path("one.json").write_text(json.dumps({"tags": ["x"], "my rows": chats(3)}))
    Path("many.json").write_text(json.dumps({"tags": ["x"], "my rows": chats(3)}, indent=1))
    for name in ("one", "many"):
        found = json.loads(run("check", f"{name}.json", *MODEL, "--json").stdout)
        assert os.system(found["hint"]) == 0
        assert run("check", f"{name}-rows.json", *MODEL).exit_code == 0
    write([{"turns": chats(1)[0]["messages"]}])
    assert json.loads(run("check", "rows.jsonl", *MODEL, "--json").stdout)["hint"] == "--set 'data.columns={messages: turns}'"
    assert run("check", "rows.jsonl", *MODEL, "--set", "data.columns={messages: turns}").exit_code == 0


def test_a_repeated_key_is_repaired_only_if_its_values_are_equal() -> None:
    same = json.dumps(answer("a"))[:-1] + ', "id": 7, "id": 7}'
    other = json.dumps(answer("b"))[:-1] + ', "id": 7, "id": 8}'
    run("check", write([*chats(2), same, other]), *MODEL, "--no-quality", "--fix", "clean.jsonl")
    kept = [json.loads(line) for line in Path("clean.jsonl").read_text().splitlines()]
    assert kept == [*chats(2), {**answer("a"), "id": 7}]
    told = [json.loads(line) for line in Path("clean.jsonl.changes.jsonl").read_text().splitlines()]
    assert [(change["what"], change["code"], change["line"]) for change in told] == [
        ("mended", "data.repeated-key", 3),
        ("dropped", "data.repeated-key", 4),
    ]


def test_splits_and_columns_are_reported_and_rows_in_two_splits_are_warnings() -> None:
    rows = [{"question": f"What is {number}?", "answer": f"It is {number}.", "id": number} for number in range(12)]
    Path("d").mkdir()
    for name, some in (("train", rows[:8]), ("dev", rows[7:10]), ("test", rows[5:6])):
        write(some, f"d/{name}.jsonl")
    result = run("check", "d", *MODEL, "--no-quality")
    assert result.exit_code == 0
    assert (
        "d: splits by the names of its files: train is read (train.jsonl); validation is there to evaluate on (dev.jsonl);" in result.stdout
    )
    assert "8 rows in 1 file" in result.stdout and "3 rows to evaluate on in 1 file" in result.stdout
    assert "prompt_completion: every row has `question` (the prompt) and `answer` (learned); not read: id" in result.stdout
    assert "warning[data.shared-with-eval]: d/train.jsonl:8: is in the evaluation data too, d/dev.jsonl:1" in result.stderr
    assert "warning[data.shared-with-split]: d/train.jsonl: 1 row to train on in the split test too" in result.stderr
    assert "1 rows" not in result.stdout and run("check", "d", *MODEL, "--set", "data.split=test").stdout.count("1 row in 1 file") == 1
    assert "test is read (test.jsonl)" in run("stats", "d", *MODEL, "--set", "data.split=test").stderr
    shown = run("show", "d", *MODEL, "-n", "1")
    assert "d/train.jsonl:1 (--row 0)" in shown.stdout and "test is left alone" in shown.stderr
    assert run("check", "d", *MODEL, "--set", "data.split=tost").exit_code == 3
