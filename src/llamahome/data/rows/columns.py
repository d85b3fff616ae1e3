"""The setting data.columns applied to a row: columns of other names, and templates that make a text of several columns.

A value with `{column}` in it is a template, in which `{{` and `}}` are braces; any other value is the name of a column. A line or paragraph
of a template whose columns are all empty in a row (missing, null or white space) is left out with the line ends before it. A template
whose columns are all empty makes no text. A column may lie within others: `data.turns.0.text` are keys, and positions in lists.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llamahome.config.columns import template_pieces
from llamahome.data.files.jsonrow import kind
from llamahome.data.rows.row_error import RowError

Names = Mapping[str, str]
_LINE_ENDS = re.compile(r"(\n+)")


def setting(**columns: str) -> str:
    """The option that sets data.columns, quoted for a shell."""
    inside = ", ".join(f"{ours}: {_yaml(theirs)}" for ours, theirs in columns.items())
    return f"--set {shlex.quote(f'data.columns={{{inside}}}')}"


def _yaml(text: str) -> str:
    """The text as a value inside a YAML mapping on one line."""
    plain = re.fullmatch(r"[A-Za-z][\w-]*(?: [\w-]+)*", text) and text.lower() not in ("true", "false", "null", "yes", "no", "on", "off")
    return text if plain else json.dumps(text, ensure_ascii=False)


@lru_cache(maxsize=256)
def columns_of(written: str) -> tuple[str, ...]:
    """The columns that a value of data.columns reads, in order."""
    return tuple(column for _, column in template_pieces(written) if column is not None) or (written,)


@lru_cache(maxsize=256)
def is_template(written: str) -> bool:
    """Whether the value of data.columns is a template, not the name of a column."""
    return any(column is not None for _, column in template_pieces(written))


def with_named(value: dict[str, Any], names: Names) -> dict[str, Any]:
    """The row with what each template and each path of `names` means, under the template or path itself as key.

    Raises RowError for a column of a template that is not text.
    """
    found: dict[str, Any] = {}
    for written in names.values():
        if is_template(written):
            found[written] = rendered(written, value)
        elif written not in value and (within := at_path(value, written)) is not None:
            found[written] = within
    return {**value, **found} if found else value


def at_path(value: Any, path: str) -> Any:
    """What lies under a key, or under keys and positions in lists with dots between them; None if nothing does."""
    if isinstance(value, list):
        place, _, rest = path.partition(".")
        if not place.isdecimal() or int(place) >= len(value):
            return None
        return at_path(value[int(place)], rest) if rest else value[int(place)]
    if not isinstance(value, Mapping) or path in value:
        return value[path] if isinstance(value, Mapping) else None
    for dot in re.finditer(r"\.", path):  # a key may have dots itself
        if (found := at_path(value.get(path[: dot.start()]), path[dot.end() :])) is not None:
            return found
    return None


def text_paths(value: Mapping[str, Any]) -> list[str]:
    """Paths to the texts within the objects and lists of a row; of a list the first text, or those of its first object."""
    return [f"{key}.{rest}" for key, cell in value.items() for rest in _texts_within(cell)]


def _texts_within(cell: object) -> list[str]:
    inner = {"0": cell[0]} if isinstance(cell, list) and cell else cell
    if not isinstance(inner, dict):
        return []
    paths = [key if isinstance(part, str) else f"{key}.{rest}" for key, part in inner.items() for rest in _texts_within(part) or [""]]
    return [path for path in paths if not path.endswith(".") and not re.search(r"[{}]", path)]


def rendered(written: str, value: Mapping[str, Any]) -> str:
    """The template's text for this row; raises RowError."""
    cells = {column: _text(at_path(value, column), column) for column in columns_of(written)}
    filled = {column for column, cell in cells.items() if cell.strip()}
    texts: list[str] = []
    for paragraph in _paragraphs(written) if filled else ():
        if _is_empty(paragraph, filled):
            continue
        for line in paragraph:
            if not _is_empty((line,), filled):
                text = "".join(literal if column is None else cells[column] if column in filled else "" for literal, column in line.pieces)
                has_blanks = any(column is not None and column not in filled for _, column in line.pieces)
                texts += [line.before if texts else "", text.strip(" \t") if has_blanks else text]
    return "".join(texts)


@dataclass(frozen=True)
class _Line:
    """One line of a template."""

    before: str
    """The line ends before it; two or more begin a paragraph."""
    pieces: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> list[str]:
        return [column for _, column in self.pieces if column is not None]


def _is_empty(lines: tuple[_Line, ...], filled: set[str]) -> bool:
    """Whether the lines have columns, all of them empty."""
    columns = [column for line in lines for column in line.columns]
    return bool(columns) and not filled & {*columns}


@lru_cache(maxsize=256)
def _paragraphs(written: str) -> tuple[tuple[_Line, ...], ...]:
    """The lines of the template, grouped by the empty lines between them."""
    lines: list[_Line] = []
    pieces: list[tuple[str, str | None]] = []
    before = ""
    for text, column in template_pieces(written):
        if column is not None:
            pieces.append((text, column))
            continue
        for part in _LINE_ENDS.split(text):
            if part.startswith("\n"):
                lines.append(_Line(before, tuple(pieces)))
                pieces, before = [], part
            elif part:
                pieces.append((part, None))
    lines.append(_Line(before, tuple(pieces)))
    paragraphs: list[list[_Line]] = [[]]
    for line in lines:
        if len(line.before) > 1:
            paragraphs.append([])
        paragraphs[-1].append(line)
    return tuple(map(tuple, paragraphs))


def _text(cell: object, column: str) -> str:
    """A cell as text: numbers as JSON writes them, "" for null; a RowError for lists, objects and numbers that are not finite."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int | float) and math.isfinite(cell):
        return str(cell)
    raise RowError("data.wrong-type", f"{column} is {kind(cell)}; a template of data.columns takes texts and numbers")
