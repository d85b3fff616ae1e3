"""Which format the rows are in, found from the first of them, with the reason; never from the file's name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.data.formats import FORMATS, TURN_LISTS
from llamahome.data.jsonrow import excerpt
from llamahome.data.records import Row
from llamahome.data.turns import nearest
from llamahome.errors import DataError, Problem

SAMPLE = 64
"""Rows that are looked at."""

_REASONS = {
    "messages": "a list `{key}` of objects with role and content",
    "sharegpt": "a list `{key}` of objects with from and value",
    "alpaca": "`instruction` and `output`",
    "prompt_completion": "`prompt` and `completion`",
    "text": "`text`, and no other key that a format knows",
}


@dataclass(frozen=True)
class DetectedFormat:
    """The name of a format and why the rows are believed to be in it."""

    name: str
    reason: str


def detect(rows: Sequence[Row], wanted: str) -> DetectedFormat:
    """The one format of the first rows; `wanted` other than "auto" is taken at its word.

    Raises DataError when the rows are preference pairs, of more than one format, or of none.
    """
    if wanted != "auto":
        return DetectedFormat(wanted, f"data.format is {wanted}")
    rows = rows[:SAMPLE]
    pairs = next((row for row in rows if {"chosen", "rejected"} <= row.value.keys()), None)
    if pairs is not None:
        raise DataError(_preference(pairs))
    firsts: dict[str, Row] = {}
    count = 0
    for row in rows:
        name = _format_of(row.value)
        if name is not None:
            firsts.setdefault(name, row)
            count += 1
    if not firsts:
        raise DataError(_unknown(rows))
    if len(firsts) > 1:
        raise DataError(_mixed(firsts))
    name, row = next(iter(firsts.items()))
    key = next((key for key in TURN_LISTS if key in row.value), "")
    many = "every row" if count == len(rows) else f"{count} of the first {len(rows)} rows"
    return DetectedFormat(name, f"{many} has {_REASONS[name].format(key=key)}" + _also(row.value, name))


def _format_of(value: dict[str, Any]) -> str | None:
    for key in TURN_LISTS:
        turns = value.get(key)
        if isinstance(turns, list):
            first = next((turn for turn in turns if isinstance(turn, dict)), {})
            return "sharegpt" if "from" in first or "value" in first else "messages"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if "prompt" in value and "completion" in value:
        return "prompt_completion"
    return "text" if "text" in value else None


def _also(value: dict[str, Any], name: str) -> str:
    """What else the rows could have been read as, for nothing is chosen in silence."""
    rest = {key: part for key, part in value.items() if key not in TURN_LISTS}
    other = _format_of(rest) if name in ("messages", "sharegpt") else ("text" if name != "text" and "text" in value else None)
    return f" (--set data.format={other} would read its other keys instead)" if other else ""


def _preference(row: Row) -> Problem:
    chosen = "messages: .chosen" if isinstance(row.value["chosen"], list) else "prompt, completion: .chosen"
    return Problem(
        code="data.preference",
        message="rows are preference pairs (chosen, rejected); this version learns from good answers alone",
        where=row.where,
        excerpt=excerpt(json.dumps(row.value, ensure_ascii=False), row.line),
        hint=f"jq -c '{{{chosen}}}' '{row.source}' > chosen.jsonl   learns the chosen answers",
    )


def _mixed(firsts: dict[str, Row]) -> Problem:
    (first, one), (_, other), *_ = firsts.items()
    seen = ", ".join(f"{row.where} is {name}" for name, row in firsts.items())
    return Problem(
        code="data.mixed-formats",
        message=f"rows are in {len(firsts)} formats: {seen}",
        where=other.where,
        excerpt=excerpt(json.dumps(other.value, ensure_ascii=False), other.line),
        hint=f"a file for each format; --set data.format={first} reads rows like line {one.line} and lists every other one",
    )


def _unknown(rows: Sequence[Row]) -> Problem:
    row = rows[0]
    known = ("messages", "conversations", "instruction", "output", "prompt", "completion", "text")
    renames = [f'"{key}" to "{near}"' for key in row.value if (near := nearest(key, known)) and near not in row.value]
    keys = ", ".join(f'"{key}"' for key in list(row.value)[:8]) or "none"
    return Problem(
        code="data.unknown-format",
        message=f"the rows are in none of the formats {', '.join(FORMATS)}; the keys here are {keys}",
        where=row.where,
        excerpt=excerpt(json.dumps(row.value, ensure_ascii=False), row.line),
        hint=f"rename {', '.join(renames)}" if renames else 'rename the keys, for example to "prompt" and "completion"',
    )
