"""What kind of file it is: by its name, and for .json and nameless files by how it begins."""

import json
import shlex
from pathlib import Path
from typing import Literal

from llamahome.data.files.disguise import refuse_disguised
from llamahome.data.files.encoding import to_utf8, wide_encoding
from llamahome.data.files.jsonl import BOM
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.jsontable import refuse_table
from llamahome.data.files.spool import PACKED
from llamahome.data.files.watch import WatchedFile
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
"""None: its first bytes decide."""
ENDINGS = tuple(suffix for suffix in _BY_NAME if suffix)
_HEAD = 1 << 16
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


def kind_of(file: WatchedFile) -> Kind:
    """The kind of a file that is_read; raises DataError for one that is not what its name says."""
    named = _BY_NAME[ending(file.path)]
    head = file.read(0, min(_HEAD, file.size))
    refuse_disguised(file, head, named)
    if named not in ("parquet", "arrow"):
        _refuse_wide(file, head)
    if named in (None, "jsonl"):
        refuse_table(file, head)
    if named in ("csv", "tsv"):
        _refuse_json(file, head)
    if named is not None:
        return named
    begin = head.removeprefix(BOM).lstrip()[:1]
    if begin == b"[":
        return "array"
    if ending(file.path) == ".json" and begin and not is_object(_first_line(file)):
        raise DataError(_no_rows(file.path, head))
    return "jsonl"


def _refuse_json(file: WatchedFile, head: bytes) -> None:
    """DataError when what is called a table holds rows in JSON."""
    begin = head.removeprefix(BOM).lstrip()[:2]
    array = begin[:1] == b"[" and head.removeprefix(BOM)[1:].lstrip()[:1] == b"{"
    if not array and not (begin[:1] == b"{" and is_object(_first_line(file))):
        return
    suffix, place = Path(file.path).suffix, Path(file.path)
    better = place.with_suffix(".json" if array else ".jsonl")
    hint = f"mv {shlex.quote(file.path)} {shlex.quote(str(better))}" if file.place == file.path and not better.exists() else None
    message = f"the file holds rows in JSON, not {suffix.lower()} as its name says"
    raise DataError(Problem(code="data.other-kind", message=message, where=file.path, hint=hint))


def _refuse_wide(file: WatchedFile, head: bytes) -> None:
    """DataError when the file is UTF-16, UTF-32, with or without a byte order mark, or ISO-2022-JP."""
    encoding = wide_encoding(head, lambda: (block.tobytes() for _, block in file.blocks()))
    if encoding is not None:
        message, hint = f"the file is {encoding}, not UTF-8", to_utf8(encoding, file.path)
        raise DataError(Problem(code="data.not-utf8", message=message, where=f"{file.path}:1", hint=hint))


CHANGES = ".changes.jsonl"
"""End of the name of what `data check --fix` writes about a cleaned copy."""


def holds_rows(path: str) -> bool:
    """Whether a file of a folder is data: not the record of `data check --fix`, and of .json an array or an object in its first line."""
    if path.endswith(CHANGES):
        return False
    if ending(path) != ".json" or Path(path).suffix.lower() in PACKED:
        return True
    if Path(path).name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json"):
        return False
    file = WatchedFile(path)
    try:
        begin = file.read(0, min(_HEAD, file.size)).removeprefix(BOM).lstrip()[:1]
        return begin != b"{" or is_object(_first_line(file))
    finally:
        file.close()


def is_object(line: bytes) -> bool:
    """Whether the line is a JSON object of its own."""
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _first_line(file: WatchedFile) -> bytes:
    return file.read(0, min(_FIRST_LINE, file.size)).removeprefix(BOM).lstrip().partition(b"\n")[0]


def list_within(value: object) -> str | None:
    """The key of an object under which it has a list of objects, which may be the rows."""
    pairs = value.items() if isinstance(value, dict) else ()
    return next((key for key, part in pairs if isinstance(part, list) and part and isinstance(part[0], dict)), None)


def take_out(path: str, key: str) -> str:
    """A command that makes a file of the rows that stand in a list under `key` of one object."""
    code = "import json,sys; json.dump(json.load(open(sys.argv[1], encoding='utf-8-sig'))[sys.argv[2]], sys.stdout)"
    target = Path(path).with_name(Path(path).stem + "-rows.json")
    return f'python3 -c "{code}" {shlex.quote(path)} {shlex.quote(key)} > {shlex.quote(str(target))}'


def _whole(path: str) -> object:
    """What a file holds that is one JSON value; None when it is not, or is too large to look."""
    place = Path(path)
    try:
        return json.loads(place.read_text(encoding="utf-8-sig")) if place.stat().st_size <= _FIRST_LINE else None
    except (ValueError, RecursionError, OSError):
        return None


def _holds_several(path: str) -> bool:
    """Whether the file is JSON objects one after the other, seen from the first two."""
    decoder, place = json.JSONDecoder(), Path(path)
    try:
        text = place.read_text(encoding="utf-8-sig").strip() if place.stat().st_size <= _FIRST_LINE else ""
        _, end = decoder.raw_decode(text)
        return isinstance(decoder.raw_decode(text[end:].lstrip())[0], dict)
    except (ValueError, RecursionError, OSError):
        return False


def _no_rows(path: str, head: bytes) -> Problem:
    """A .json file that is neither an array nor lines of objects."""
    text = head.decode("utf-8", "replace").lstrip("\ufeff")
    line = 1 + text[: len(text) - len(text.lstrip())].count("\n")
    several = text.lstrip().startswith("{") and _holds_several(path)
    key = list_within(_whole(path)) if text.lstrip().startswith("{") and not several else None
    hint: str | None = "a .json file holds an array of objects, or one object a line" if key is None else take_out(path, key)
    what = "an object over several lines" if text.lstrip().startswith("{") else "neither an array nor objects"
    if several:
        what = "objects one after the other that are not in a line each"
        hint = (
            f"jq -c . {shlex.quote(path)} > {shlex.quote(str(Path(path).with_suffix('.jsonl')))}" if Path(path).suffix == ".json" else None
        )
    message = f"the file holds {what}, not an array of rows"
    shown = excerpt(text.lstrip().partition("\n")[0], line)
    return Problem(code="data.bad-json-array", message=message, where=f"{path}:{line}", excerpt=shown, hint=hint)
