"""`data check --fix` repairs encodings, tables in one value, and JSON as people write it; --dry-run only shows the changes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llamahome.cli.data import data_app
from llamahome.data.checks.repair_text import as_json

ROWS = [{"prompt": f"Wie heißt {number}?", "completion": f"größer als {number}"} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CHINESE = [{"prompt": f"{number} 这个问题是什么意思？", "completion": f"它是一个普通的词 {number}"} for number in range(5)]
CASES: dict[str, tuple[bytes, list[dict[str, str]]]] = {
    "cp1252.jsonl": (LINES.encode("cp1252"), ROWS),
    "cp1252.json": (json.dumps(ROWS, ensure_ascii=False, indent=1).encode("cp1252"), ROWS),
    "cp1252.csv": (("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS)).encode("cp1252"), ROWS),
    "gbk.jsonl": ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHINESE).encode("gbk"), CHINESE),
    "utf16.jsonl": (LINES.encode("utf-16"), ROWS),
    "utf16le.jsonl": (LINES.encode("utf-16-le"), ROWS),
    "utf32.json": (json.dumps(ROWS).encode("utf-32-be"), ROWS),
    "marks.jsonl": (LINES.encode("utf-8-sig").replace(b"\n{", b"\n\xef\xbb\xbf{"), ROWS),
    "commas.jsonl": (LINES.replace("}", ",}").encode(), ROWS),
    "comments.jsonl": (LINES.replace("}", "} // [a, row,]").encode(), ROWS),
    "python.jsonl": ("".join(f"{row!r}\n" for row in ROWS).encode(), ROWS),
    "twice.jsonl": (LINES.replace("{", '{"prompt": "x", "prompt": "x", ').replace(', "prompt": "Wie', ', "q": "Wie').encode(), []),
    "lists.json": (json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(), ROWS),
    "columns.json": (json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}).encode(), ROWS),
    "index.csv": ((",prompt,completion\n" + "".join(f"{n},{r['prompt']},{r['completion']}\n" for n, r in enumerate(ROWS))).encode(), ROWS),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fixed(name: str, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(data_app, ["check", name, "--no-tokens", "--no-quality", "--fix", "out.jsonl", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize("name", CASES)
def test_the_copy_holds_the_rows_and_the_record_every_change(tmp_path: Path, name: str) -> None:
    content, rows = CASES[name]
    Path(name).write_bytes(content)
    fixed(name)
    copy = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    if rows:
        assert copy == rows
    assert len(copy) == 5 or name == "twice.jsonl"
    record = [json.loads(line) for line in Path("out.jsonl.changes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert bool(record) == (name != "index.csv") and {change["source"] for change in record} <= {name}
    assert Path(name).read_bytes() == content


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_shows_each_change_and_writes_nothing(tmp_path: Path, name: str) -> None:
    Path(name).write_bytes(CASES[name][0])
    _, shown = fixed(name, "--dry-run")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name]
    lines = [line for line in shown.splitlines() if line.startswith(name) and (": mended, " in line or ": left out, " in line)]
    fixed(name)
    assert len(lines) == len(Path("out.jsonl.changes.jsonl").read_text(encoding="utf-8").splitlines())


def test_a_dry_run_needs_fix(tmp_path: Path) -> None:
    Path("a.jsonl").write_text(LINES)
    from llamahome.errors import UsageError

    result = CliRunner().invoke(data_app, ["check", "a.jsonl", "--no-tokens", "--dry-run"])
    assert isinstance(result.exception, UsageError)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "x,]}", "b": [1, 2,],}', {"a": "x,]}", "b": [1, 2]}),
        ('{"a": "http://x", /* c, } */ "b": 1} // d', {"a": "http://x", "b": 1}),
        ("{'a': None, 'b': True, 'c': 'it\\'s'}", {"a": None, "b": True, "c": "it's"}),
        ('{"a": 1}', None),
        ("{'a': 1, 'a': 2}", None),
        ("{'a': {1, 2}}", None),
        ("{'a': (1, 2)}", None),
        ("{1: 2}", None),
        ("{'a': print(1)}", None),
        ('{"a": "b" "c"}', None),
        ("{'a': '\\d'}", None),
        ('{"a": 1,,}', None),
    ],
)
def test_only_what_needs_no_guess_is_spelt_as_json(text: str, value: object) -> None:
    found = as_json(text)
    assert found is None if value is None else json.loads(str(found)) == value
