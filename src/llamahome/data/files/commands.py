"""Shell commands that a hint suggests: they turn a file that cannot be read into one that can."""

import shlex
from collections.abc import Sequence
from pathlib import Path

ROWS_OF_SHEET = "import pandas,sys; print(pandas.read_excel(sys.argv[1]).to_json(orient='records', lines=True), end='')"
_LIST_IN_OBJECT = "import json,sys; json.dump(json.load(open(sys.argv[1], encoding='utf-8-sig'))[sys.argv[2]], sys.stdout)"


_LISTS_OF_PYTHON = (
    "import ast,csv,json,sys; csv.field_size_limit(2**26); [print(json.dumps({**r,sys.argv[2]:ast.literal_eval(r[sys.argv[2]])})) "
    "for r in csv.DictReader(open(sys.argv[1],encoding='utf-8-sig',newline=''),delimiter=sys.argv[3])]"
)
_ROWS = ("rows", "data", "train", "training", "examples", "instances", "items", "records", "samples", "results", "entries")
"""The usual names of a list of rows."""


def sibling(path: str, added: str) -> Path:
    """A name beside the file: its own without the ending, then `added`."""
    return Path(path).with_name(Path(path).stem + added)


def move(path: str, target: Path | str) -> str:
    """`mv`."""
    return f"mv {shlex.quote(path)} {shlex.quote(str(target))}"


def run_python(code: str, *arguments: str, output: Path) -> str:
    """A line of Python that writes `output`."""
    quoted = " ".join(shlex.quote(argument) for argument in arguments)
    return f'python3 -c "{code}" {quoted} > {shlex.quote(str(output))}'


def list_within(value: object) -> str | None:
    """The key of an object under which it has a list of objects, which may be the rows; None if it is not clear which of several."""
    pairs = value.items() if isinstance(value, dict) else ()
    keys = [key for key, part in pairs if isinstance(part, list) and part and isinstance(part[0], dict)]
    return keys[0] if len(keys) == 1 else next((name for name in _ROWS if name in keys), None)


def is_row(value: object) -> bool:
    """Whether a value that a file holds is one row itself: texts alone, or a list of turns beside them."""
    if not isinstance(value, dict) or not value:
        return False
    lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
    return all({"role", "from", "speaker"} & part[0].keys() for part in lists) and not any(
        isinstance(part, dict) for part in value.values()
    )


def lines_of_objects(paths: Sequence[str], output: Path | str) -> str:
    """Writes each JSON object of the files, however many lines it has, in a line of its own."""
    return f"jq -c . {' '.join(map(shlex.quote, paths))} > {shlex.quote(str(output))}"


def extract_list(path: str, key: str) -> str:
    """Writes the list under `key` of the one object in the file to a file of its own."""
    return run_python(_LIST_IN_OBJECT, path, key, output=sibling(path, "-rows.json"))


def lists_of_python(path: str, column: str, delimiter: str) -> str:
    """Writes the rows of a table as JSON lines, with the lists in a column, which are in Python's notation, as JSON."""
    return run_python(_LISTS_OF_PYTHON, path, column, delimiter, output=sibling(path, "-rows.jsonl"))


def break_at_returns(path: str, output: Path | str) -> str:
    """Replaces carriage returns by line feeds."""
    return f"tr '\\r' '\\n' < {shlex.quote(path)} > {shlex.quote(str(output))}"
