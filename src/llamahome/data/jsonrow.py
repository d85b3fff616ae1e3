"""One line of a JSONL file to a Row, or to the problem that says where it stops being JSON."""

import json
import shlex
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn

from llamahome.data.records import Row
from llamahome.errors import Problem

_WIDTH = 100
"""Characters of a line that an excerpt shows."""


def parse_row(raw: bytes, *, path: str, line: int, index: int) -> Row | Problem:
    """The JSON object that `raw` holds, or a Problem that names `path:line` and the column; never raises."""
    where = f"{path}:{line}"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(
            code="data.not-utf8",
            message=f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line",
            where=where,
            excerpt=excerpt(raw.decode("utf-8", "backslashreplace"), line, at=error.start),
            hint=f"iconv -f WINDOWS-1252 -t UTF-8 '{path}' > utf8.jsonl   if it was saved on Windows",
        )
    if "\0" in text:
        column = text.index("\0")
        shown = excerpt(text.replace("\0", "\\0"), line, at=column)
        hint = f"tr -d '\\000' < '{path}' > clean.jsonl"
        return Problem(code="data.nul-byte", message=f"NUL byte at column {column + 1}", where=where, excerpt=shown, hint=hint)
    try:
        value: Any = json.loads(text, parse_constant=_refuse_constant)
    except JSONDecodeError as error:
        return _broken(error, text, where=where, line=line)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Problem(code="data.bad-json", message=f"not valid JSON: {reason}", where=where, excerpt=excerpt(text, line))
    if not isinstance(value, dict):
        message = f"a row must be a JSON object, this is {kind(value)}"
        hint = f"one object a line; an array becomes lines by {_to_lines(path)}"
        return Problem(code="data.not-an-object", message=message, where=where, excerpt=excerpt(text, line), hint=hint)
    if "\\u" in text and not _can_be_written(value):
        message = "half of a surrogate pair (\\ud800 to \\udfff) is not a character"
        return Problem(code="data.lone-surrogate", message=message, where=where, excerpt=excerpt(text, line, at=text.lower().find("\\ud")))
    return Row(index=index, source=path, line=line, value=value)


def excerpt(text: str, line: int, *, at: int = 0) -> str:
    """`37 | the line`, cut to a readable width around character `at`."""
    begin = 0 if at < _WIDTH - 10 else at - _WIDTH // 2
    part = text[begin : begin + _WIDTH].replace("\r", "").replace("\t", " ").replace("\n", " ")
    return f"{line} | {'...' if begin else ''}{part}{'...' if begin + _WIDTH < len(text) else ''}"


def _to_lines(path: str) -> str:
    """A command that writes a JSON array as one object a line."""
    code = "import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]"
    return f'python3 -c "{code}" < {shlex.quote(path)} > {shlex.quote(str(Path(path).with_suffix("")) + "-lines.jsonl")}'


def kind(value: object) -> str:
    """What JSON calls the value's type, with its article."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _can_be_written(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _broken(error: JSONDecodeError, text: str, *, where: str, line: int) -> Problem:
    whole = text.rstrip()
    ended = error.pos >= len(whole) or error.msg.startswith("Unterminated string")
    reason = "unexpected end of data" if ended else error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    column = len(whole) if ended else error.pos + 1
    hint = None
    if whole.lstrip() in ("[", "{", "[{"):
        hint = f"a row is one line; an array over many lines becomes rows by {_to_lines(where.rpartition(':')[0])}"
    elif reason == "extra data":
        hint = f"one object a line: break line {line} after column {error.pos}"
    shown = excerpt(whole, line, at=column)
    return Problem(code="data.bad-json", message=f"not valid JSON: {reason} at column {column}", where=where, excerpt=shown, hint=hint)
