"""A text or Markdown file is one row, {"text": ...}, as it is; one over 1 MiB is cut into rows at blank lines.

Without a blank line within 1 MiB it is cut at a line end, and without one between two characters. Nothing is lost: the joined rows are the
file except for white space at its beginning. A part that is only white space belongs to the row before it.
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from llamahome.data.files.byte_ranges import RangeFormat
from llamahome.data.files.commands import move
from llamahome.data.files.guarded_file import GuardedFile
from llamahome.data.files.index import NO_LINES, Notify, RowStarts
from llamahome.data.files.jsonrow import read_text
from llamahome.data.files.kinds import is_object
from llamahome.data.records import Row
from llamahome.errors import Problem
from llamahome.units import show_bytes

_LOOK = 64
_TESTED_LINES = 20
_NAME = re.compile(rb"\"?[^\W\d][\w ]{0,30}\"?")
"""Matches the name of a column."""


def text_layout(file: GuardedFile, notify: Notify) -> RangeFormat:
    """How to read the file as text; notifies about a long text, and about one that is really rows."""
    longest = file.limits.text_row
    if file.size > longest:
        notify(f"{file.path}: {show_bytes(file.size)} of text, cut at blank lines into rows of at most {show_bytes(longest)}")
    _notify_of_rows(file, notify)
    return RangeFormat(f"text {longest}", scan_text, _without_mark, partial(_parse, file.path))


def _notify_of_rows(file: GuardedFile, notify: Notify) -> None:
    """Say that a text is rows in another form, and how it would be read as such."""
    head = file.head()
    lines = head.removeprefix(codecs.BOM_UTF8).split(b"\n")
    tested = [line for line in (lines if len(head) == file.size else lines[:-1])[:_TESTED_LINES] if line.strip()]
    what, ending = _rows_in(head, tested)
    if what:
        renamed = Path(file.path).with_suffix(ending)
        command = "" if file.is_copy or renamed.exists() else f": {move(file.path, renamed)}"
        notify(f"{file.path}: {what}, and are learned as text; under a name that ends in {ending} they are rows{command}")


def _rows_in(head: bytes, lines: Sequence[bytes]) -> tuple[str, str]:
    """What the lines are if they are rows, and the ending under which they are read so; ("", "") for a text."""
    if lines and all(map(is_object, lines)):
        return "the lines are JSON objects", ".jsonl"
    if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{\s*\"", head):
        return "the lines are an array of JSON objects", ".json"
    for delimiter, ending in ((b"\t", ".tsv"), (b",", ".csv"), (b";", ".csv")):
        names = [name.strip() for name in lines[0].split(delimiter)] if len(lines) > 2 else []
        equal = len(names) > 1 and {line.count(delimiter) for line in lines} == {len(names) - 1}
        if equal and all(map(_NAME.fullmatch, names)) and not (delimiter == b"," and b" " in lines[0]):
            return "the lines have the form of a table", ending
    return "", ""


def scan_text(file: GuardedFile) -> Iterator[RowStarts]:
    """Offset and line of each part."""
    begin, line = 0, 1
    if file.size == len(codecs.BOM_UTF8) and file.head() == codecs.BOM_UTF8:
        begin = file.size
    while begin < file.size:
        window = file.read(begin, min(file.size, begin + file.limits.text_row))
        cut = len(window) if begin + len(window) == file.size else _cut(window)
        if not window[:_LOOK].isspace() or window[:cut].strip():  # the short look saves a copy of nearly every part
            yield np.array([begin]), np.array([line])
        line += window.count(b"\n", 0, cut)
        begin += cut
    yield np.array([file.size]), NO_LINES


def _cut(window: bytes) -> int:
    """The offset after the last blank line, else after the last line, else before the last character, which may continue."""
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


def _without_mark(raw: bytes) -> bytes:
    return raw.removeprefix(codecs.BOM_UTF8)


def _parse(path: str, raw: bytes, line: int, number: int) -> Row | Problem:
    text = read_text(_without_mark(raw), path=path, line=line)
    return text if isinstance(text, Problem) else Row(index=number, source=path, line=line, value={"text": text})
