"""The files that `--fix` reads and writes: readable copies of files that cannot be read row by row, and the cleaned copy.

A file in another encoding is recoded to UTF-8; a whole table in one JSON value, or a broken array, becomes one row per line. These copies
lie in a temporary folder, and each is recorded as one change of its file. Memory: one block of a recoded file; all of a table or an array
(at most 64 MiB).
"""

import codecs
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llamahome import durable
from llamahome.data.checks.broken_array import lines_of_array
from llamahome.data.checks.repair import Change
from llamahome.data.files.encoding import codec_of, decodes, encoding_of, wide_encoding
from llamahome.data.files.guarded_file import LONGEST_ROW
from llamahome.data.files.jsontable import rows_of, shape_of
from llamahome.data.files.kinds import ending
from llamahome.data.files.locate import locate
from llamahome.data.files.spool import PACKED, content_place, text_to
from llamahome.errors import MachineError, Problem

_BLOCK = 1 << 20
_HEAD = 1 << 16


@dataclass(frozen=True)
class Readable:
    """Paths that can be read row by row, and the files they were made from."""

    paths: tuple[str, ...]
    originals: dict[str, str]
    """The path of each copy and the path of its file."""
    changes: tuple[tuple[str, Change], ...] = ()
    """Each file that was copied, and what was changed in it."""


@contextlib.contextmanager
def readable(paths: Sequence[str]) -> Iterator[Readable]:
    """The files that the paths mean, with copies of those that cannot be read row by row. Raises DataError as `locate` does."""
    with tempfile.TemporaryDirectory(prefix="llamahome-fix-") as folder:
        files, originals, changes = [], {}, []
        for number, path in enumerate(locate(tuple(paths)).files):
            place = Path(folder) / str(number)
            place.mkdir()
            packed = Path(path).suffix.lower() in PACKED
            target = place / (Path(path).stem if packed else Path(path).name)
            made = _make_copy(content_place(path), ending(path), target)
            if made is not None:
                copy, change = made
                originals[str(copy)] = path
                changes.append((path, change))
            files.append(path if made is None else str(made[0]))
        yield Readable(tuple(files) if changes else tuple(paths), originals, tuple(changes))


def _make_copy(path: str, kind: str, target: Path) -> tuple[Path, Change] | None:
    """The copy of a file that needs one, and what was changed in it. `kind` is the ending of the name, without .gz or .zst."""
    if kind in (".parquet", ".arrow"):
        return None
    with Path(path).open("rb") as file:
        head = file.read(_HEAD)
        encoding = wide_encoding(head, lambda: _blocks(path))
    if encoding is not None and not decodes(_blocks(path), codec_of(encoding)):  # it begins with a byte order mark, but its end is cut off
        return None
    if encoding is None and kind not in (".jsonl", ".ndjson") and not decodes(_blocks(path), "utf-8"):  # JSON lines are repaired one by one
        encoding = encoding_of(path)
    if encoding is not None:
        _recode(path, codec_of(encoding), target)
        if (array := _as_lines(str(target), kind, target)) is not None:
            return array, Change("data.not-utf8", None, encoding, "UTF-8, one object a line")
        table = _as_rows(str(target), kind, target)
        return table[0] if table else target, Change("data.not-utf8", None, encoding, "UTF-8")
    if kind not in (".json", ".jsonl", ".ndjson", ""):
        return None
    array = _as_lines(path, kind, target)
    if array is not None:
        return array, Change("data.bad-json-array", None, "array", "one object a line")
    table = _as_rows(path, kind, target)
    return None if table is None else (table[0], Change("data.whole-table", None, table[1], "one object a line"))


def _blocks(path: str) -> Iterator[bytes]:
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _recode(path: str, codec: str, target: Path) -> None:
    decoder = codecs.getincrementaldecoder(codec)()
    with Path(path).open("rb") as file, target.open("wb") as sink:
        while block := file.read(_BLOCK):
            sink.write(decoder.decode(block).encode())
        sink.write(decoder.decode(b"", final=True).encode())


def _as_lines(path: str, kind: str, target: Path) -> Path | None:
    """A file of JSON lines with the objects of an array whose commas or end are wrong."""
    if Path(path).stat().st_size > LONGEST_ROW or kind not in (".json", ""):
        return None
    lines = lines_of_array(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    if lines is None:
        return None
    made = target.with_name(target.stem + "-lines.jsonl")
    made.write_text(lines, encoding="utf-8", errors="surrogateescape")
    return made


def _as_rows(path: str, kind: str, target: Path) -> tuple[Path, str] | None:
    """A file of JSON lines with the rows of a file that is one table, and the shape of the table."""
    if Path(path).stat().st_size > LONGEST_ROW or kind not in (".json", ".jsonl", ".ndjson", ""):
        return None
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    shape = shape_of(value)
    rows = None if shape is None else rows_of(value, shape)
    if shape is None or rows is None:
        return None
    lines = target.with_name(target.stem + "-rows.jsonl")
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return lines, shape


class PreviewFile(io.StringIO):
    """Stands in for a file: gives each line that is written, an entry of the record, to `show`, if there is one."""

    def __init__(self, show: Callable[[dict[str, Any]], None] | None) -> None:
        super().__init__()
        self._show = show

    def write(self, text: str, /) -> int:
        """Show one line of the record."""
        if self._show is not None:
            self._show(json.loads(text))
        return len(text)


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[Sequence[TextIO]]:
    """Files to write. They get their names if the block succeeds and are removed otherwise; a name in .gz or .zst is compressed."""
    parts = [target.with_name(f".{target.name}.part-{os.getpid()}.jsonl") for target in targets]
    try:
        with contextlib.ExitStack() as stack:
            targets[0].parent.mkdir(parents=True, exist_ok=True)
            yield [stack.enter_context(text_to(part, target.name)) for part, target in zip(parts, targets, strict=True)]
        for part in parts:
            durable.flush(part)
        for part, target in reversed(list(zip(parts, targets, strict=True))):  # the record first, so that a copy always has one
            durable.rename(part, target)
    except OSError as error:
        message = f"cannot write the cleaned copy: {error.strerror}"
        hint = "--fix with a place that can be written and has room"
        raise MachineError(Problem(code="machine.cannot-write", message=message, where=str(targets[0]), hint=hint)) from error
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()
