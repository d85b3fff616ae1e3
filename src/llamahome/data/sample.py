"""Writes the sample data: functions of the running Python's standard library, and the docstring that each of them has.

Every machine that runs llamahome has this text, so nothing is downloaded. The rows are ordered by a hash of their content, so that the
first n are a random sample, the same on every machine with the same Python. Cost: a few seconds to parse the library.
"""

import ast
import hashlib
import inspect
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from llamahome import durable
from llamahome.errors import MachineError, Problem

FILE_NAME = "docstrings.jsonl"
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__", "_bundled", "__phello__"}
_FEW = ("textwrap", "inspect", "shutil", "statistics", "random", "fractions", "ast", "heapq")
"""Modules of which `write_few` takes the rows: 0.2 s instead of 3 s for the whole library."""
_LEAST_DOCSTRING, _MOST_SOURCE = 20, 4000
"""Characters: a shorter docstring teaches nothing, a longer function fills the context."""
_LOOKS_LIKE_CONTROL = re.compile(r"<[|/]?[A-Za-z0-9_]+\|?>|\[/?(?:INST|PAD|UNK|CLS|SEP|MASK)\]|[\0\ud800-\udfff]")
"""Texts that are a control token of some model, as <filename> is of the starter; such rows would be refused."""
_QUESTION = "Write the docstring of this Python function.\n\n```python\n{source}\n```"


def write_sample(path: Path, *, rows: int | None) -> int:
    """Write the first `rows` rows (None: all) to `path` with one rename; returns how many there are. Raises MachineError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(path, mode="w") as file:
            lines = set(_lines(Path(sysconfig.get_paths()["stdlib"])))
            chosen = sorted((hashlib.blake2b(line.encode()).digest(), line) for line in lines)[:rows]
            file.writelines(line + "\n" for _, line in chosen)
    except OSError as error:
        message = f"cannot write the sample data: {error.strerror}"
        hint = "llamahome data sample PATH, with a path that you may write to"
        raise MachineError(Problem(code="machine.cannot-write", message=message, where=str(path), hint=hint)) from error
    return len(chosen)


def write_few(path: Path) -> int:
    """Write the rows of a few modules of the library at once, for a trial; returns how many there are. Raises OSError."""
    library = Path(sysconfig.get_paths()["stdlib"])
    lines = [line for name in _FEW for line in _lines_of(library / f"{name}.py")]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _lines(library: Path) -> Iterator[str]:
    for file in sorted(library.rglob("*.py")):
        if _SKIPPED.isdisjoint(file.relative_to(library).parts):
            yield from _lines_of(file)


def _lines_of(file: Path) -> Iterator[str]:
    for question, answer in _pairs(file):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": turns}, ensure_ascii=False)


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    """Question and answer for each function of the file; a file that this Python cannot parse has none."""
    try:
        text = file.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pair = _pair(node, lines)
            if pair is not None and not any(_LOOKS_LIKE_CONTROL.search(side) for side in pair):
                yield pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None or len(node.body) < 2:
        return None
    answer = inspect.cleandoc(docstring).strip()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    statement, following = node.body[0], node.body[1]
    begins, ends = statement.lineno, statement.end_lineno or statement.lineno
    if begins <= node.lineno or following.lineno <= ends or len(answer) < _LEAST_DOCSTRING:
        return None
    while not lines[ends].strip():
        ends += 1
    kept = lines[first - 1 : begins - 1] + lines[ends : node.end_lineno]
    source = textwrap.dedent("\n".join(kept)).rstrip()
    return (_QUESTION.format(source=source), answer) if len(source) <= _MOST_SOURCE else None
