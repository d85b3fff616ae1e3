"""The head of a table of text: what separates its columns, what they are called, and which of them are none.

Three things are not taken at their word but tested on the first records: a separator is one when it gives every record as many fields as
the names; a column without a name is left out when it is empty or counts the rows, as pandas writes its index. Cost: one read of 64 KiB.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llamahome.data.files.index import Tell

_SIGNS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "|", "^": "^", "~": "~", ":": "a colon"}
_RARE = "^~:"
"""Signs of text as much as separators: taken only where a record shows it."""
_TESTED = 50
"""Records."""
_SEPARATOR_LINE = re.compile(r'("?)sep=([\x01-\x7f])\1', re.IGNORECASE)
_COUNT = re.compile(r"-?\d+(\.0)?")
_INDEX_NAME = re.compile(r"Unnamed: \d+(_level_\d+)?")


@dataclass(frozen=True)
class Left:
    """A column that is left out."""

    position: int
    counts: bool
    """It holds numbers of rows; otherwise nothing."""

    def fits(self, cell: str) -> bool:
        """Whether a cell is what the column was left out for."""
        return not cell.strip() or (self.counts and _COUNT.fullmatch(cell.strip()) is not None)


def sign_name(sign: str) -> str:
    """A comma, a semicolon, |."""
    return _SIGNS.get(sign, sign)


def separator_line(line: str) -> str | None:
    """The separator that a first line `sep=;`, as Excel writes and reads it, names; None for any other line."""
    found = _SEPARATOR_LINE.fullmatch(line.rstrip("\r\n"))
    return found[2] if found and found[2] not in '"\r\n' else None


def separator(head: str, *, usual: str, whole: bool) -> str:
    """What separates the columns in the lines of `head`, the names first; `usual` where the name of the file is right or nothing is.

    `whole` tells that `head` is all of the file; otherwise its last record is not tested.
    """
    names = head.partition("\n")[0]
    bare = "".join(names.split('"')[::2])
    if usual == "\t" and usual in bare:
        return usual
    there = [sign for sign in _SIGNS if sign in bare]
    fitting = [sign for sign in there if _separates(sign, head, whole=whole)]
    if fitting:
        return fitting[0]
    return next((sign for sign in there if sign in ",;\t" and usual == ","), usual)


def _separates(sign: str, head: str, *, whole: bool) -> bool:
    """Whether all tested records have as many fields as the first names columns."""
    records = _records(head, sign, whole=whole)
    if not records or (sign in _RARE and (len(records) < 2 or not all(re.fullmatch(r"[\w. -]{1,60}", name) for name in records[0]))):
        return False
    return len({len(record) for record in records}) == 1


def _records(head: str, sign: str, *, whole: bool) -> list[list[str]]:
    found: list[list[str]] = []
    before = csv.field_size_limit(1 << 26)
    try:
        for record in csv.reader((line + "\n" for line in head.split("\n")), delimiter=sign, strict=True):
            if record:
                found.append(record)
            if len(found) > _TESTED:
                return found[:-1]
    except csv.Error:
        return found  # what is whole before the broken or cut record
    finally:
        csv.field_size_limit(before)
    return found if whole else found[:-1]


def left_out(names: Sequence[str], head: str, delimiter: str, *, whole: bool) -> tuple[Left, ...]:
    """Columns that hold nothing or the numbers of rows: those without a name, and the index as pandas names it when it reads it back."""
    records = [record for record in _records(head, delimiter, whole=whole)[1:] if len(record) == len(names)]
    found = []
    for position, name in enumerate(names):
        unnamed = not name
        if not unnamed and not _INDEX_NAME.fullmatch(name):
            continue
        cells = [record[position].strip() for record in records]
        if unnamed and not any(cells):
            found.append(Left(position, counts=False))
        elif cells and all(_COUNT.fullmatch(cell) for cell in cells) and (position == 0 or _follow(cells)):
            found.append(Left(position, counts=True))
    return tuple(found) if len(found) < len(names) else ()


def _follow(cells: Sequence[str]) -> bool:
    numbers = [float(cell) for cell in cells]
    return len(numbers) > 1 and all(after - before == 1 for before, after in pairwise(numbers))


def tell_left(path: str, names: Sequence[str], left: Sequence[Left], tell: Tell) -> None:
    """Say which columns are left out, and why."""
    for column in left:
        name = f"column {column.position + 1}, {names[column.position]!r}," if names[column.position] else f"column {column.position + 1}"
        why = "it counts the rows, as the index of pandas does" if column.counts else "it has no name and is empty"
        tell(f"{path}: {name} is left out: {why}")
