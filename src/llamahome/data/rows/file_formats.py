"""Refuses files that hold rows of different formats, as a folder with chats beside preference pairs does, and says which file holds what.

The first rows of each file decide. Files whose rows the format of the first file reads as well belong to it. A file whose rows are in no
known format says nothing here, because its rows are refused one by one.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.columns import Names, with_named
from llamahome.data.rows.detect import format_of
from llamahome.data.rows.formats import FORMATS, understand
from llamahome.data.rows.judged import find_judged
from llamahome.data.rows.row_error import RowError
from llamahome.data.rows.single_messages import single_messages
from llamahome.errors import DataError, Problem
from llamahome.rundir import not_an_option

MOST_FILES = 64
ROWS_OF_FILE = 8
"""How many files are looked at, and how many rows of each."""
_MOST_NAMED = 3
"""Files of one format that a message and a command name."""


def refuse_mixed_files(files: Sequence[Sequence[Row]], names: Names) -> None:
    """Raise DataError if the first rows of these files are in different formats. `names` is data.columns."""
    if len(files) < 2:
        return
    places: dict[str, list[str]] = {}
    options: dict[str, str] = {}
    for rows in files:
        found = _kind_of(rows, names)
        if found is not None:
            kind, option = found
            if first := next(iter(places), None):
                kind = first if _reads(first, rows, names) else kind
            places.setdefault(kind, []).append(rows[0].source)
            options.setdefault(kind, option)
    if len(places) < 2:
        return
    held = "; ".join(f"{', '.join(paths[:_MOST_NAMED])}{_more(paths)}: {kind}" for kind, paths in places.items())
    commands = [_command(paths, options[kind]) for kind, paths in places.items() if len(paths) <= _MOST_NAMED]
    hint = "; ".join(commands) if len(commands) == len(places) else "a folder for the files of each format"
    raise DataError(Problem(code="data.mixed-formats", message=f"the files are in {len(places)} formats: {held}", hint=hint))


def _kind_of(rows: Sequence[Row], names: Names) -> tuple[str, str] | None:
    """What the rows of a file are, and the option that learns from them; None if it is not clear."""
    if not rows or (not names and single_messages(rows) is not None):
        return None
    judged = find_judged(rows, names)
    if judged is not None:
        _, found = judged
        return found.what, (found.learns or "").partition("   ")[0]
    try:
        kinds = {kind for row in rows if (kind := format_of(with_named(row.value, names), names)) is not None}
    except RowError:
        return None
    return (kinds.pop(), "") if len(kinds) == 1 else None


def _reads(kind: str, rows: Sequence[Row], names: Names) -> bool:
    """Whether these rows are read in the format `kind` as well: `messages` and `sharegpt` are the same turns in other words."""
    return kind in FORMATS and all(isinstance(understand(row, kind, names), Conversation) for row in rows)


def _more(paths: Sequence[str]) -> str:
    return f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""


def _command(paths: Sequence[str], option: str) -> str:
    """The command that trains on these files alone."""
    typed = [shlex.quote(not_an_option(str(Path(path)))) for path in paths]
    return " ".join(["llamahome train", *typed, *([option] if option else [])])
