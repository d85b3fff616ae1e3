"""The kind of a data file: by its name, and for .json and files without an ending by its first bytes."""

import codecs
import json
import shlex
from pathlib import Path
from typing import Literal

from llamahome.data.files.commands import extract_list, is_row, lines_of_objects, list_within, move
from llamahome.data.files.encoding import to_utf8, wide_encoding
from llamahome.data.files.guarded_file import GuardedFile
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.jsontable import refuse_table
from llamahome.data.files.jsontext import json_or_none
from llamahome.data.files.signatures import refuse_disguised
from llamahome.data.files.spool import PACKED
from llamahome.errors import DataError, Problem

Kind = Literal["jsonl", "array", "csv", "tsv", "parquet", "arrow", "text"]

_BY_NAME: dict[str, Kind | None] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": None,
    "": None,
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
}
"""None: the first bytes decide."""
ENDINGS = tuple(suffix for suffix in _BY_NAME if suffix)
CHANGES = ".changes.jsonl"
"""The end of the name of the record that `data check --fix` writes about a cleaned copy."""
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json")
_FIRST_LINE = 1 << 24


def ending(path: str) -> str:
    """The suffix that tells the kind, without that of an archive around it: `.jsonl` of a.jsonl.gz."""
    place = Path(path)
    return Path(place.stem).suffix.lower() if place.suffix.lower() in PACKED else place.suffix.lower()


def is_read(path: str) -> bool:
    """Whether files of this name are read."""
    return ending(path) in _BY_NAME


def is_text(path: str) -> bool:
    """Whether the name is that of plain text."""
    return _BY_NAME.get(ending(path)) == "text"


def holds_rows(path: str) -> bool:
    """Whether a file in a folder is data. A .json file is if it holds an array or begins with a line that is an object."""
    if path.endswith(CHANGES):
        return False
    if ending(path) != ".json" or Path(path).suffix.lower() in PACKED:
        return True
    if Path(path).name in _NOT_ROWS:
        return False
    file = GuardedFile(path)
    try:
        return _text(file.head())[:1] != b"{" or is_object(_first_line(file))
    finally:
        file.close()


def kind_of(file: GuardedFile) -> Kind:
    """The kind of a file that is_read; raises DataError if the file is not what its name says."""
    named = _BY_NAME[ending(file.path)]
    head = file.head()
    refuse_disguised(file, head, named)
    if named not in ("parquet", "arrow"):
        _refuse_wide(file, head)
    if named in (None, "jsonl"):
        refuse_table(file, head)
    if named in ("csv", "tsv"):
        _refuse_json(file, head)
    if named is not None:
        return named
    begin = _text(head)[:1]
    if begin == b"[":
        return "array"
    if ending(file.path) == ".json" and begin and not is_object(_first_line(file)):
        raise DataError(_no_rows(file.path, head))
    return "jsonl"


def is_object(line: bytes) -> bool:
    """Whether the line is a JSON object."""
    return isinstance(json_or_none(line), dict)


def _text(head: bytes) -> bytes:
    return head.removeprefix(codecs.BOM_UTF8).lstrip()


def _first_line(file: GuardedFile) -> bytes:
    return _text(file.read(0, min(_FIRST_LINE, file.size))).partition(b"\n")[0]


def _refuse_json(file: GuardedFile, head: bytes) -> None:
    """DataError if a file with the name of a table holds rows in JSON."""
    text = _text(head)
    array = text[:1] == b"[" and text[1:].lstrip()[:1] == b"{"
    if not array and not (text[:1] == b"{" and is_object(_first_line(file))):
        return
    place = Path(file.path)
    renamed = place.with_suffix(".json" if array else ".jsonl")
    hint = None if file.is_copy or renamed.exists() else move(file.path, renamed)
    message = f"the file holds rows in JSON, not {place.suffix.lower()} as its name says"
    raise DataError(Problem(code="data.other-kind", message=message, where=file.path, hint=hint))


def _refuse_wide(file: GuardedFile, head: bytes) -> None:
    """DataError if the file is UTF-16, UTF-32, with or without a byte order mark, or ISO-2022-JP."""
    encoding = wide_encoding(head, lambda: (block.tobytes() for _, block in file.blocks()))
    if encoding is not None:
        message, hint = f"the file is {encoding}, not UTF-8", to_utf8(encoding, file.path)
        raise DataError(Problem(code="data.not-utf8", message=message, where=f"{file.path}:1", hint=hint))


def _no_rows(path: str, head: bytes) -> Problem:
    """The problem of a .json file that is neither an array nor lines of objects."""
    text = head.decode("utf-8", "replace").lstrip("\ufeff")
    rows = text.lstrip()
    line = 1 + text[: len(text) - len(rows)].count("\n")
    whole = _read_small(path) if rows.startswith("{") else ""
    hint: str | None = "a .json file holds an array of objects, or one object a line"
    if _several_objects(whole):
        what = "objects one after the other that are not in a line each"
        target = shlex.quote(str(Path(path).with_suffix(".jsonl")))
        hint = f"jq -c . {shlex.quote(path)} > {target}" if Path(path).suffix == ".json" else None
    elif rows.startswith("{"):
        what, value = "an object over several lines", json_or_none(whole)
        key = list_within(value)
        if is_row(value):
            hint = lines_of_objects([path], Path(path).with_suffix(".jsonl"))
        elif key is not None:
            hint = extract_list(path, key)
    else:
        what = "neither an array nor objects"
    message = f"the file holds {what}, not an array of rows"
    shown = excerpt(rows.partition("\n")[0], line)
    return Problem(code="data.bad-json-array", message=message, where=f"{path}:{line}", excerpt=shown, hint=hint)


def _read_small(path: str) -> str:
    """The text of the file; "" if it is large, packed or not text."""
    place = Path(path)
    try:
        return place.read_text(encoding="utf-8-sig").strip() if place.stat().st_size <= _FIRST_LINE else ""
    except (ValueError, OSError):
        return ""


def _several_objects(text: str) -> bool:
    """Whether the text is JSON objects one after the other, judged by the first two."""
    decoder = json.JSONDecoder()
    try:
        _, end = decoder.raw_decode(text)
        return isinstance(decoder.raw_decode(text[end:].lstrip())[0], dict)
    except (ValueError, RecursionError):
        return False
