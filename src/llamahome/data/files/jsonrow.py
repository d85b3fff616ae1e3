"""The bytes of one row to text and to a Row, or to the problem that says where they stop being UTF-8 or JSON."""

import json
import shlex
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn

from llamahome.data.records import Row
from llamahome.errors import DataError, Problem

_WIDTH = 100
"""Characters of a line that an excerpt shows."""


def parse_row(raw: bytes, *, path: str, line: int, index: int) -> Row | Problem:
    """The JSON object that `raw` holds, or a Problem that names `path:line` and the column; never raises. `line` is where `raw` begins."""
    text = read_text(raw, path=path, line=line)
    if isinstance(text, Problem):
        return text
    where = f"{path}:{line}"
    try:
        value: Any = json.loads(text) if text.startswith("\ufeff") else _DECODER.decode(text)  # loads tells of the byte order mark
    except JSONDecodeError as error:
        return _broken(error, text, path=path, line=line)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Problem(code="data.bad-json", message=f"not valid JSON: {reason}", where=where, excerpt=excerpt(text, line))
    if not isinstance(value, dict):
        message = f"a row must be a JSON object, this is {kind(value)}"
        hint = "one object a line"
        if text.lstrip().startswith("["):
            hint += f"; an array is read from a .json file: {_as_array(path)}"
        return Problem(code="data.not-an-object", message=message, where=where, excerpt=excerpt(text, line), hint=hint)
    if "\\u" in text and not can_be_written(value):
        message = "half of a surrogate pair (\\ud800 to \\udfff) is not a character"
        return Problem(code="data.lone-surrogate", message=message, where=where, excerpt=excerpt(text, line, at=text.lower().find("\\ud")))
    return Row(index=index, source=path, line=line, value=value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
"""Made once: json.loads makes one for each row, a fifth of the time of a short one."""


def read_text(raw: bytes, *, path: str, line: int) -> str | Problem:
    """`raw` as text, or the Problem of a byte that is not UTF-8 or is NUL, with its line; `raw` begins in `line`."""
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
            hint=f"{_to_utf8('WINDOWS-1252', path)}   if it was saved on Windows",
        )
    if "\0" not in text:
        return text
    begin, line, column = _place(text, text.index("\0"), line)
    shown = excerpt(text[begin:].partition("\n")[0].replace("\0", "\\0"), line, at=column - 1)
    hint = f"tr -d '\\000' < {shlex.quote(path)} > {shlex.quote('clean' + Path(path).suffix)}"
    return Problem(code="data.nul-byte", message=f"NUL byte at column {column}", where=f"{path}:{line}", excerpt=shown, hint=hint)


def refuse_utf16(head: bytes, *, path: str) -> None:
    """Raise DataError when the first bytes of a file say that it is UTF-16."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        message = "the file is UTF-16, not UTF-8"
        raise DataError(Problem(code="data.not-utf8", message=message, where=f"{path}:1", hint=_to_utf8("UTF-16", path)))


def _to_utf8(encoding: str, path: str) -> str:
    place = Path(path)
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {shlex.quote(f'{place.stem}-utf8{place.suffix}')}"


def _place(text: str, at: int, line: int) -> tuple[int, int, int]:
    """Where the line of character `at` begins, its number and the one-based column, when the text begins in `line`."""
    begin = text.rfind("\n", 0, at) + 1
    return begin, line + text.count("\n", 0, begin), at - begin + 1


def excerpt(text: str, line: int, *, at: int = 0) -> str:
    """`37 | the line`, cut to a readable width around character `at`."""
    begin = 0 if at < _WIDTH - 10 else at - _WIDTH // 2
    part = text[begin : begin + _WIDTH].replace("\r", "").replace("\t", " ").replace("\n", " ")
    return f"{line} | {'...' if begin else ''}{part}{'...' if begin + _WIDTH < len(text) else ''}"


def _as_array(path: str) -> str:
    return f"mv {shlex.quote(path)} {shlex.quote(str(Path(path).with_suffix('.json')))}"


def kind(value: object) -> str:
    """What JSON calls the value's type, with its article."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def can_be_written(value: object) -> bool:
    """Whether the value's texts are characters alone; half a surrogate pair is none."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _broken(error: JSONDecodeError, text: str, *, path: str, line: int) -> Problem:
    whole = text.rstrip()
    ended = error.pos >= len(whole) or error.msg.startswith("Unterminated string")
    reason = "unexpected end of data" if ended else error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    begin, line, column = _place(whole, len(whole) - 1 if ended else error.pos, line)
    hint = None
    if whole.lstrip() in ("[", "{", "[{"):
        hint = f"a row is one line; an array over many lines is read from a .json file: {_as_array(path)}"
    elif reason == "extra data":
        hint = f"one object a line: break line {line} after column {column - 1}"
    shown = excerpt(whole[begin:].partition("\n")[0], line, at=column)
    message = f"not valid JSON: {reason} at column {column}"
    return Problem(code="data.bad-json", message=message, where=f"{path}:{line}", excerpt=shown, hint=hint)
