"""Every command in a help line is run in a shell beside the bad file, and afterwards the problem is gone."""

import bz2
import gzip
import json
import lzma
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.corpus import CORPUS, Case, cases, write_unreadable_as_text
from tests.support.hints import codes_with_commands

from llamahome.cli.data import data_app

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
GERMAN = LINES.replace("answer", "größer, heißt")
BAD_FILES = {
    "gzip.jsonl": gzip.compress(LINES.encode()),
    "xz.csv": lzma.compress(b"prompt,completion\na,b\n"),
    "bzip2.jsonl": bz2.compress(LINES.encode()),
    "text.jsonl.gz": LINES.encode(),
    "text.parquet": LINES.encode(),
    "cp1252.jsonl": GERMAN.encode("cp1252"),
    "cp1252.csv": "prompt,completion\nheißt,größer\n".encode("cp1252"),
    "gbk.jsonl": LINES.replace("answer", "这个问题是什么意思？它是一个普通的词").encode("gbk"),
    "utf16le.jsonl": LINES.encode("utf-16-le"),
    "utf16be.jsonl": GERMAN.encode("utf-16-be"),
    "utf16.csv": "prompt,completion\na,ö\n".encode("utf-16"),
    "utf32.jsonl": GERMAN.encode("utf-32"),
    "lists.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
    "columns.json": json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}).encode(),
    "split.json": json.dumps({"columns": ["prompt", "completion"], "index": [0], "data": [["a", "b"]]}).encode(),
    "array.jsonl": json.dumps(ROWS, indent=1).encode(),
    "array-in-a-line.jsonl": json.dumps(ROWS).encode(),
    "over-lines.jsonl": "".join(json.dumps(row, indent=1) + "\n" for row in ROWS).encode(),
    "json-under.csv": LINES.encode(),
    "array-under.tsv": json.dumps(ROWS).encode(),
    "one-after-another.json": "".join(map(json.dumps, ROWS)).encode(),
    "over-lines.json": "".join(json.dumps(row, indent=1) + "\n" for row in ROWS).encode(),
    "cr.jsonl": LINES.replace("\n", "\r").encode(),
    "cr.csv": b"prompt,completion\ra,b\rc,d\r",
    "tight.json": json.dumps({"index": [0], "columns": ["prompt", "completion"], "data": [["a", "b"]], "index_names": [None]}).encode(),
    "marked.json": ("\ufeff" + json.dumps({"version": "1", "data": ROWS}, indent=1)).encode(),
    "open.json": json.dumps(ROWS).encode()[:-1],
    "lines.json": ("[]\n" + LINES).encode(),
    "backslashes.csv": b'"prompt","completion"\n"a","say \\"b\\""\n',
    "single-quotes.csv": b"prompt,completion\n'a','b, c'\n'd','e'\n",
    "title.csv": b"# exported today\nprompt,completion\na,b\nc,d\n",
    "drawn-by-psql.csv": b" prompt | completion \n--------+------------\n a b, c | d\n e      | f\n(2 rows)\n",
    "drawn-by-mysql.tsv": b'+---+---+\n| prompt | completion |\n+---+---+\n| a | "b" |\n| c | d |\n+---+---+\n2 rows in set\n',
    "one-more.csv": b"prompt,completion\na,b,\nc,d,\n",
    "python-lists.csv": b"messages\n\"[{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]\"\n",
    "keyed.json": json.dumps({f"row{number}": row for number, row in enumerate(ROWS)}, indent=1).encode(),
    "nested.jsonl": "".join(json.dumps({"row": row}) + "\n" for row in ROWS).encode(),
    "served.json": json.dumps({"features": [{"name": "prompt"}], "rows": [{"row": row} for row in ROWS]}).encode(),
    "one-conversation.json": json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, indent=1
    ).encode(),
    "messages.csv": b"conversation_id,role,content\n1,user,a\n1,assistant,b\n2,user,c\n2,assistant,d\n",
    "choices.jsonl": b'{"question": "Which?", "A": "this", "B": "that", "answer": "B"}\n',
    "numbers.jsonl": b'{"question": "1 + 1?", "answer": 2}\n',
    "headerless.csv": b"What is this?,a\nWhat is that?,b\n",
}
"""Files beside the corpus, each with one fault that a command repairs."""
PROGRAMS = ("iconv", "jq", "tail", "mv", "python3", "tr", "printf", "bzip2", "xz", "gzip", "zstd", "llamahome", "mkdir")
NO_REPAIR = ("gzip -t", "zstd -t", "llamahome data show")
"""Commands that show more of the fault instead of repairing it."""
NEEDS = {"pandas.read_excel": "pandas and openpyxl", "git lfs": "a repository with a server"}


def command_in(hint: str) -> str | None:
    """The command in a help line: it is at the start or after a colon, and ends before three spaces."""
    for part in (hint, *hint.split(": ")[1:]):
        command = part.split("   ")[0]
        if command.split(" ")[0] in PROGRAMS and not any(words in hint for words in NO_REPAIR):
            return command
    return None


def findings(path: str, *words: str) -> list[dict[str, object]]:
    arguments = ["check", path, "--no-tokens", "--no-quality", "--json", *words]
    result = CliRunner().invoke(data_app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def run_in_shell(command: str, folder: Path) -> Path | None:
    """Run the command; returns the file or folder that it made, or None if it changed a file in place."""
    for program in ("iconv", "jq", "zstd", "xz", "bzip2"):
        if program in shlex.split(command) and not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    for words, what in NEEDS.items():
        if words in command:
            pytest.skip(f"needs {what}")
    before = {path.name for path in folder.iterdir()}
    if command.startswith("llamahome "):
        command = f"{shlex.quote(sys.executable)} -m {command}"
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)
    made = [path for path in folder.iterdir() if path.name not in before]
    assert len(made) <= 1
    return made[0] if made else None


def hints_of(name: str, *words: str) -> dict[str, str]:
    """The help line of each error in the file, with its code."""
    return {str(one["hint"]): str(one["code"]) for one in findings(name, *words) if one["hint"] and one["level"] == "error"}


@pytest.fixture(autouse=True)
def change_to_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check_help(folder: Path, name: str, words: tuple[str, ...] = ()) -> int:
    """Run each command in the file's help lines on a fresh copy, which must repair its fault; returns how many there were."""
    tried = 0
    for hint, code in hints_of(name, *words).items():
        command, setting = command_in(hint), re.search(r"--set ('[^']+'|\S+)", hint)
        if command is not None:
            scratch = folder / f"scratch-{tried}"
            scratch.mkdir()
            shutil.copy(folder / name, scratch / name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(scratch)
                made = run_in_shell(command, scratch)
                left = findings(made.name if made else name, *words)
            assert [one for one in left if one["code"] == code and one["level"] == "error"] == [], command
            tried += 1
        elif setting is not None:
            left = findings(name, *words, "--set", shlex.split(setting[1])[0])
            assert [one for one in left if one["code"] == code and one["level"] == "error" and one["hint"] == hint] == [], hint
            tried += 1
    return tried


@pytest.mark.parametrize("name", BAD_FILES)
def test_the_help_of_a_bad_file_repairs_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD_FILES[name])
    assert check_help(tmp_path, name) > 0


TYPED = codes_with_commands()
WITH_COMMANDS = [case for case in cases() if any(found.level == "error" and found.code in TYPED for found in case.finds)]


@pytest.mark.parametrize("case", WITH_COMMANDS, ids=lambda case: " ".join((case.file, *case.settings)))
def test_every_command_in_the_help_of_the_corpus_repairs_its_fault(tmp_path: Path, case: Case) -> None:
    name, given = case.file, case.settings
    if (CORPUS / name).exists():
        shutil.copy(CORPUS / name, tmp_path / name)
    else:
        write_unreadable_as_text(tmp_path)
    if not (tmp_path / name).is_file():
        return
    check_help(tmp_path, name, tuple(word for text in given for word in ("--set", text)))


@pytest.mark.parametrize("lines", ['["a", "b"]\n["c", "d"]\n', '[{"a": 1}]\n[{"a": 2}]\n'])
def test_lines_of_lists_are_not_renamed_to_a_json_file(tmp_path: Path, lines: str) -> None:
    Path("rows.jsonl").write_text(lines)
    assert not any("mv " in hint for hint in hints_of("rows.jsonl"))
