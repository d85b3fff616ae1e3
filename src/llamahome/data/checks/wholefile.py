"""Files that `--fix` cannot read row by row are first made readable: other encodings to UTF-8, a whole table in one JSON value to rows.

The readable copy lies in a folder of its own while the cleaned copy is written, and is gone afterwards; what was done is one change of
its file. Memory: one block of a file in another encoding; all of a table, which is at most 64 MiB.
"""

import codecs
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamahome.data.checks.mend import Change
from llamahome.data.files.encoding import codec_of, encoding_of, wide_encoding
from llamahome.data.files.jsontable import rows_of, shape_of
from llamahome.data.files.kinds import ending
from llamahome.data.files.locate import locate
from llamahome.data.files.spool import PACKED
from llamahome.data.files.watch import LONGEST_ROW

_BLOCK = 1 << 20
_HEAD = 1 << 16


@dataclass(frozen=True)
class Readable:
    """Paths that can be read, and what they stand for."""

    paths: tuple[str, ...]
    originals: dict[str, str]
    """Path of each copy to that of its file."""
    changes: tuple[tuple[str, Change], ...] = ()
    """What was done, with the file that it was done to."""


@contextlib.contextmanager
def readable(paths: Sequence[str]) -> Iterator[Readable]:
    """The files that the paths mean, those that cannot be read as they are replaced by copies; raises DataError as locate does."""
    with tempfile.TemporaryDirectory(prefix="llamahome-fix-") as folder:
        files, originals, changes = [], {}, []
        for number, path in enumerate(locate(tuple(paths)).files):
            place = Path(folder) / str(number)
            place.mkdir()
            found = None if Path(path).suffix.lower() in PACKED else _copied(path, place / Path(path).name)
            if found is not None:
                target, change = found
                originals[str(target)] = path
                changes.append((path, change))
            files.append(path if found is None else str(found[0]))
        yield Readable(tuple(files) if changes else tuple(paths), originals, tuple(changes))


def _copied(path: str, target: Path) -> tuple[Path, Change] | None:
    """The copy of a file that needs one, and what was changed in it."""
    kind = ending(path)
    if kind in (".parquet", ".arrow"):
        return None
    with Path(path).open("rb") as file:
        encoding = wide_encoding(file.read(_HEAD), lambda: iter(lambda: file.read(_BLOCK), b""))
    if encoding is None and kind not in (".jsonl", ".ndjson") and not _is_utf8(path):  # of lines each is mended by itself
        encoding = encoding_of(path)
    if encoding is not None:
        _recode(path, codec_of(encoding), target)
        table = _as_rows(str(target), target)
        return table[0] if table else target, Change("data.not-utf8", None, encoding, "UTF-8")
    if kind not in (".json", ".jsonl", ".ndjson", ""):
        return None
    table = _as_rows(path, target)
    return None if table is None else (table[0], Change("data.whole-table", None, table[1], "one object a line"))


def _is_utf8(path: str) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with Path(path).open("rb") as file:
        try:
            while block := file.read(_BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _recode(path: str, codec: str, target: Path) -> None:
    decoder = codecs.getincrementaldecoder(codec)()
    with Path(path).open("rb") as file, target.open("wb") as sink:
        while block := file.read(_BLOCK):
            sink.write(decoder.decode(block).encode())
        sink.write(decoder.decode(b"", final=True).encode())


def _as_rows(path: str, target: Path) -> tuple[Path, str] | None:
    """The rows of a file that is one table, in a file of lines, and the shape of the table."""
    if Path(path).stat().st_size > LONGEST_ROW or ending(path) not in (".json", ".jsonl", ".ndjson", ""):
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
