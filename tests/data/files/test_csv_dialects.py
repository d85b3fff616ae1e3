"""Tables that are not written as usual: the reason is named, and the command writes one with the same cells; usual tables are untouched."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llamahome.data.files.csv_dialects import other_dialect
from llamahome.data.files.plaintext import _rows_in
from llamahome.data.files.sources import open_source
from llamahome.errors import DataError

WANTED = [{"prompt": f"question {number}", "completion": f'say "hi", {number}'} for number in range(4)]
TABLES = {
    "backslash": '"prompt","completion"\n' + "".join(f'"question {n}","say \\"hi\\", {n}"\n' for n in range(4)),
    "single quotes": "prompt,completion\n" + "".join(f"'question {n}','say \"hi\", {n}'\n" for n in range(4)),
    "space": "prompt, completion\n" + "".join(f'question {n}, "say ""hi"", {n}"\n' for n in range(4)),
    "one delimiter more": "prompt;completion\n" + "".join(f'question {n};"say ""hi"", {n}";\n' for n in range(4)),
    "part of the texts": "prompt\tcompletion\n"
    + "".join(f'question {n}\tsay "hi", {n}\n' for n in range(3))
    + 'question 3\t"quoted" start\n',
    "drawn": "| prompt | completion |\n|:--|:-:|\n" + "".join(f'| question {n} | say "hi", {n} |\n' for n in range(4)),
    "in line 3": "# exported\n# by hand\nprompt,completion\n" + "".join(f'question {n},"say ""hi"", {n}"\n' for n in range(4)),
}


@pytest.mark.parametrize("what", TABLES)
def test_the_command_writes_the_same_rows_in_the_usual_way(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "mine.tsv" if "\t" in TABLES[what] else "mine.csv"
    Path(name).write_text(TABLES[what])
    with pytest.raises(DataError) as caught:
        open_source(name)
    problem = caught.value.problems[0]
    assert problem.code == "data.bad-csv" and what in problem.message
    subprocess.run(str(problem.hint).replace("python3", shlex.quote(sys.executable), 1), shell=True, check=True)
    made = next(path.name for path in tmp_path.glob("mine-*"))
    source = open_source(made)
    wanted = [*WANTED[:3], {"prompt": "question 3", "completion": '"quoted" start'}] if name == "mine.tsv" else WANTED
    assert [source.row(number).value for number in range(len(source))] == wanted


@pytest.mark.parametrize(
    "text",
    [
        "prompt,completion\na,b\n'tis,c\n",
        'prompt,completion\n"a","b"\nc,"d\n',
        "prompt,completion\na,b\nc,d,e\n",
        "prompt,completion\na | b,--|--\n--,---\n",
        "prompt,completion\na,b\nc,\n",
        "text\none, two\nthree, four\n",
        'prompt,completion\na,"C:\\\\"\n',
        "question\nWhat, then?\nfirst,second\nthird,fourth\n",
    ],
)
def test_usual_and_broken_tables_are_left_to_the_reader(text: str) -> None:
    assert other_dialect("mine.csv", text, ",", whole=True) is None


def test_a_table_that_goes_on_after_the_tested_part_is_tested_without_its_cut_record() -> None:
    text = TABLES["single quotes"] + "'question 4','cut he"
    assert other_dialect("mine.csv", text, ",", whole=False) is not None


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', ".jsonl"),
        ('[\n {"text": "a"},\n {"text": "b"}]\n', ".json"),
        ("prompt\tcompletion\na\tb\nc\td\n", ".tsv"),
        ("prompt,completion\na,b\nc,d\n", ".csv"),
        ("Dear Ann,\nthank you, all is well,\nyours,\n", ""),
        ("To be, or not\nto be, that\nis the, question\n", ""),
        ("[1] a note\n", ""),
        ("Name:\tAnn\n", ""),
    ],
)
def test_a_text_that_is_rows_is_told(text: str, ending: str) -> None:
    lines = [line for line in text.encode().split(b"\n") if line.strip()]
    assert _rows_in(text.encode(), lines)[1] == ending
