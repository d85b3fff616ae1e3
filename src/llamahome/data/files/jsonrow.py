"""Decodes the bytes of one row to a Row, or to a Problem with the line and column where they are not UTF-8 or JSON."""

import codecs
import json
import math
import shlex
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from llamahome.data.files.commands import break_at_returns, move, sibling
from llamahome.data.files.encoding import help_for
from llamahome.data.files.jsontext import LoneSurrogate, NotFinite, RepeatedKey, Unusual, from_json, json_or_none, with_not_finite
from llamahome.data.records import Row
from llamahome.errors import Problem

_EDGE = 1 << 12
"""Bytes at both ends of a file that may be white space."""
_FIRST_LINE = 1 << 24
_WIDTH = 100
"""Characters of a line that an excerpt shows."""
_JSON_TYPES = {
    Unusual: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def parse_row(raw: bytes, *, path: str, line: int, index: int) -> Row | Problem:
    """The JSON object in `raw`, which begins in `line`, or a Problem with `path:line` and the column; never raises."""
    text = read_text(raw, path=path, line=line)
    if isinstance(text, Problem):
        return text
    where = f"{path}:{line}"
    try:
        value = _value(text)
    except JSONDecodeError as error:
        return _not_json(error, text, path=path, line=line, index=index)
    except RepeatedKey as error:
        return _repeated(error, text, where=where, line=line)
    except LoneSurrogate as error:
        shown = excerpt(text, line, at=text.lower().find("\\ud"))
        return Problem(code="data.lone-surrogate", message=str(error), where=where, excerpt=shown)
    except ValueError as error:
        return Problem(code="data.bad-json", message=f"not valid JSON: {error}", where=where, excerpt=excerpt(text, line))
    if isinstance(value, dict):
        return Row(index, path, line, value)
    message = f"a row must be a JSON object, this is {kind(value)}"
    hint = "one object a line"
    if index == 0 and text.lstrip().startswith("[") and (command := _rename_array(path)):
        hint += f"; an array is read from a .json file: {command}"
    return Problem(code="data.not-an-object", message=message, where=where, excerpt=excerpt(text, line), hint=hint)


def _value(text: str) -> Any:
    """The JSON value. An object may hold NaN and infinities, because they matter only if they are used."""
    try:
        return from_json(text)
    except NotFinite:
        value = with_not_finite(text)
        if isinstance(value, dict):
            return value
        raise


def read_text(raw: bytes, *, path: str, line: int) -> str | Problem:
    """`raw`, which begins in `line`, as text, or the Problem of a byte that is NUL or not UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        begin = raw.rfind(b"\n", 0, error.start) + 1
        line += raw.count(b"\n", 0, begin)
        shown = raw[begin:].split(b"\n", 1)[0].decode("utf-8", "backslashreplace")
        return Problem(
            code="data.not-utf8",
            message=f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start - begin + 1} of the line",
            where=f"{path}:{line}",
            excerpt=excerpt(shown, line, at=error.start - begin),
            hint=help_for(path),
        )
    if "\0" not in text:
        return text
    begin, line, column = _position(text, text.index("\0"), line)
    shown = excerpt(text[begin:].partition("\n")[0].replace("\0", "\\0"), line, at=column - 1)
    hint = f"tr -d '\\000' < {shlex.quote(path)} > {shlex.quote('clean' + Path(path).suffix)}"
    return Problem(code="data.nul-byte", message=f"NUL byte at column {column}", where=f"{path}:{line}", excerpt=shown, hint=hint)


def _position(text: str, at: int, line: int) -> tuple[int, int, int]:
    """Where the line of character `at` begins, its number and the one-based column, if the text begins in `line`."""
    begin = text.rfind("\n", 0, at) + 1
    return begin, line + text.count("\n", 0, begin), at - begin + 1


def excerpt(text: str, line: int, *, at: int = 0) -> str:
    """`37 | the line`, cut to a readable width around character `at`."""
    begin = 0 if at < _WIDTH - 10 else at - _WIDTH // 2
    part = text[begin : begin + _WIDTH].replace("\r", "").replace("\t", " ").replace("\n", " ")
    return f"{line} | {'...' if begin else ''}{part}{'...' if begin + _WIDTH < len(text) else ''}"


def _rename_array(path: str) -> str | None:
    """The command that renames a JSONL file to .json if the whole file begins and ends as an array."""
    place = Path(path)
    if place.suffix.lower() not in (".jsonl", ".ndjson") or place.with_suffix(".json").exists():
        return None
    try:
        with place.open("rb") as file:
            begin = file.read(_EDGE).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            file.seek(max(0, place.stat().st_size - _EDGE))
            end = file.read(_EDGE).rstrip()[-1:]
            file.seek(0)
            one_list_a_line = json_or_none(file.readline(_FIRST_LINE)) is not None and file.readline(_FIRST_LINE).strip()
    except OSError:
        return None
    return move(path, place.with_suffix(".json")) if (begin, end) == (b"[", b"]") and not one_list_a_line else None


def kind(value: object) -> str:
    """What JSON calls the value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return _JSON_TYPES[type(value)]


def _repeated(error: RepeatedKey, text: str, *, where: str, line: int) -> Problem:
    key = json.dumps(error.path.rpartition(".")[2], ensure_ascii=False)
    same = all(value == error.values[0] for value in error.values)
    hint = "write it once" if same else "keep the one that is meant"
    shown = excerpt(text, line, at=max(0, text.find(key, text.find(key) + 1)))
    return Problem(code="data.repeated-key", message=f"{error}; only one can be learned", where=where, excerpt=shown, hint=hint)


def _not_json(error: JSONDecodeError, text: str, *, path: str, line: int, index: int) -> Problem:
    text = text.rstrip()
    ended = error.pos >= len(text) or error.msg.startswith("Unterminated string")
    reason = "unexpected end of data" if ended else error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    begin, line, column = _position(text, len(text) - 1 if ended else error.pos, line)
    hint = None
    if index == 0 and text.lstrip() in ("[", "[{") and (command := _rename_array(path)):
        hint = f"a row is one line; an array over many lines is read from a .json file: {command}"
    elif index == 0 and text.lstrip() == "{" and Path(path).suffix.lower() in (".jsonl", ".ndjson"):
        target = shlex.quote(Path(path).stem + "-lines.jsonl")
        hint = f"jq -c . {shlex.quote(path)} > {target}   if it holds objects over many lines: a row is one line"
    elif reason == "extra data" and text[error.pos] == "{" and "\r" in text[: error.pos].rpartition("}")[2]:
        hint = break_at_returns(path, sibling(path, "-lines" + Path(path).suffix).name)
    elif reason == "extra data" and text[error.pos] == "{":
        hint = f"one object a line: break line {line} after column {column - 1}"
    shown = excerpt(text[begin:].partition("\n")[0], line, at=column)
    message = f"not valid JSON: {reason} at column {column}"
    return Problem(code="data.bad-json", message=message, where=f"{path}:{line}", excerpt=shown, hint=hint)
