"""Writes the sample data: functions of the running Python's standard library, and the docstring that each of them has.

Every machine that runs llamahome has this text, so no download is needed. The rows are in the order of a hash of their content, so that the
first n are a fair sample, and the same on every machine with the same Python. Cost: parsing the library, a few seconds.
"""

import ast
import hashlib
import inspect
import json
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from llamahome.errors import MachineError, Problem

FILE_NAME = "docstrings.jsonl"
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__", "_bundled", "__phello__"}
_LEAST_DOCSTRING, _MOST_SOURCE = 20, 4000
"""Characters: shorter docstrings teach nothing, longer functions fill a whole context."""
_LOOKS_LIKE_CONTROL = re.compile(r"<[|/]?[A-Za-z0-9_]+\|?>|\[/?(?:INST|PAD|UNK|CLS|SEP|MASK)\]|[\0\ud800-\udfff]")
"""Texts that are a control token in one model or another, as <filename> is in the starter; such rows would be refused."""
_QUESTION = "Write the docstring of this Python function.\n\n```python\n{source}\n```"


def write_sample(path: Path, *, rows: int | None) -> int:
    """Write the first `rows` rows (None: all) to `path`, whole or not at all; returns how many there are. Raises MachineError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                lines = set(_lines(Path(sysconfig.get_paths()["stdlib"])))
                chosen = sorted((hashlib.blake2b(line.encode()).digest(), line) for line in lines)[:rows]
                file.writelines(line + "\n" for _, line in chosen)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        message = f"cannot write the sample data: {error.strerror}"
        hint = "llamahome data sample PATH with a place that you may write to"
        raise MachineError(Problem(code="machine.cannot-write", message=message, where=str(path), hint=hint)) from error
    return len(chosen)


def _lines(library: Path) -> Iterator[str]:
    for file in sorted(library.rglob("*.py")):
        if _SKIPPED.isdisjoint(file.relative_to(library).parts):
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
