"""A text or Markdown file is one row, {"text": ...}, as it stands; one over 1 MiB is cut into rows at blank lines.

Where there is no blank line within 1 MiB it is cut at a line's end, and without one between two characters. Nothing is lost: the
rows joined are the file but for white space at its head; a part that would be white space alone belongs to the row before it.
"""

import json
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from llamahome.data.files.index import NO_LINES, Piece, Tell
from llamahome.data.files.jsonl import BOM
from llamahome.data.files.jsonrow import read_text
from llamahome.data.files.stretches import Layout
from llamahome.data.files.watch import WatchedFile
from llamahome.data.records import Row
from llamahome.errors import Problem
from llamahome.units import show_bytes

_LONGEST = 1 << 20
"""Bytes of a row (1 MiB); a text is learned in pieces of max_length tokens anyhow."""
_LOOK = 64
_JSON_HEAD, _JSON_LINES = 1 << 16, 20
"""Bytes and lines in which rows under the name of a text are looked for."""


def text_layout(file: WatchedFile, tell: Tell) -> Layout:
    """How to read the file as text; a long one is told."""
    if file.size > _LONGEST:
        tell(f"{file.path}: {show_bytes(file.size)} of text, cut at blank lines into rows of at most {show_bytes(_LONGEST)}")
    _tell_rows(file, tell)
    return Layout(f"text {_LONGEST}", scan_text, _whole, partial(_parse, file.path))


def _tell_rows(file: WatchedFile, tell: Tell) -> None:
    """Say when the text is JSON lines, which are learned with their signs under this name."""
    lines = file.read(0, min(_JSON_HEAD, file.size)).removeprefix(BOM).split(b"\n")
    whole = [line for line in (lines if file.size <= _JSON_HEAD else lines[:-1])[:_JSON_LINES] if line.strip()]
    if whole and all(_is_object(line) for line in whole):
        better = shlex.quote(str(Path(file.path).with_suffix(".jsonl")))
        name = (
            f": mv {shlex.quote(file.path)} {better}"
            if file.place == file.path and not Path(file.path).with_suffix(".jsonl").exists()
            else ""
        )
        tell(f"{file.path}: the lines are JSON objects, and are learned as text; under a name that ends in .jsonl they are rows{name}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def scan_text(file: WatchedFile) -> Iterator[Piece]:
    """Start and line of each part."""
    begin, line = 0, 1
    if file.size == len(BOM) and file.read(0, file.size) == BOM:
        begin = file.size
    while begin < file.size:
        window = file.read(begin, min(file.size, begin + _LONGEST))
        cut = len(window) if begin + len(window) == file.size else _cut(window)
        if not window[:_LOOK].isspace() or window[:cut].strip():  # the short look saves a copy of nearly every part
            yield np.array([begin]), np.array([line])
        line += window.count(b"\n", 0, cut)
        begin += cut
    yield np.array([file.size]), NO_LINES


def _cut(window: bytes) -> int:
    """After the last blank line; else after the last line; else before the last character that may go on."""
    blank = max(window.rfind(b"\n\n") + 2, window.rfind(b"\n\r\n") + 3)
    if blank > 3:
        return blank
    line = window.rfind(b"\n") + 1
    if line:
        return line
    end = len(window) - 1
    while end > len(window) - 4 and window[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _whole(stretch: bytes) -> bytes:
    return stretch.removeprefix(BOM)


def _parse(path: str, stretch: bytes, line: int, number: int) -> Row | Problem:
    text = read_text(_whole(stretch), path=path, line=line)
    return text if isinstance(text, Problem) else Row(index=number, source=path, line=line, value={"text": text})
