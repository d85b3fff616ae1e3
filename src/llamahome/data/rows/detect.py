"""Which format the rows are in, found from the first of them, with the reason; never from the file's name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.kinds import ending, list_within, take_out
from llamahome.data.records import Row
from llamahome.data.rows.fault import nearest
from llamahome.data.rows.formats import FORMATS, KEYS, OWN_NAMES, TURN_LISTS, Names, turn_list
from llamahome.errors import DataError, Problem

SAMPLE = 64
"""Rows that are looked at."""

_REASONS = {
    "messages": "a list `{key}` of objects with role and content",
    "sharegpt": "a list `{key}` of objects with from and value",
    "alpaca": "`{instruction}` and `{output}`",
    "prompt_completion": "`{prompt}` and `{completion}`",
    "text": "`{text}`, and no other key that a format knows",
}
_PAIRS = (("chosen", "rejected"), ("accepted", "rejected"), ("chosen_response", "rejected_response"), ("preferred", "dispreferred"))
"""Keys of a better and a worse answer."""


@dataclass(frozen=True)
class DetectedFormat:
    """The name of a format and why the rows are believed to be in it."""

    name: str
    reason: str


def detect(rows: Sequence[Row], wanted: str, names: Names = OWN_NAMES) -> DetectedFormat:
    """The one format of the first rows; `wanted` other than "auto" is taken at its word. `names` is data.columns.

    Raises DataError when the rows are preference data, of more than one format, or of none, or when a column in `names` is not there
    or not read.
    """
    rows = rows[:SAMPLE]
    _check_columns(rows, names)
    found = DetectedFormat(wanted, f"data.format is {wanted}") if wanted != "auto" else _detect(rows, names)
    unread = [ours for ours in names if ours not in KEYS[found.name]]
    if unread:
        message = f"data.columns.{unread[0]} is not read: the rows are in the format {found.name} ({found.reason})"
        fitting = [name for name in FORMATS if all(ours in KEYS[name] for ours in names)]
        hint = f"--set data.format={fitting[0]}" if fitting else f"{found.name} reads {', '.join(KEYS[found.name])}"
        raise DataError(Problem(code="data.unread-column", message=message, where=rows[0].where if rows else None, hint=hint))
    return found


def _detect(rows: Sequence[Row], names: Names) -> DetectedFormat:
    for row in rows:
        problem = _preference(row)
        if problem is not None:
            raise DataError(problem)
    firsts: dict[str, Row] = {}
    count = 0
    for row in rows:
        name = _format_of(row.value, names)
        if name is not None:
            firsts.setdefault(name, row)
            count += 1
    if not firsts:
        raise DataError(_unknown(rows))
    if len(firsts) > 1:
        raise DataError(_mixed(firsts))
    name, row = next(iter(firsts.items()))
    shown = {key: names.get(key, key) for key in KEYS[name]} | {"key": turn_list(row.value, names) or ""}
    many = "every row" if count == len(rows) else f"{count} of the first {len(rows)} rows"
    return DetectedFormat(name, f"{many} has {_REASONS[name].format(**shown)}" + _also(row.value, name, names))


def _format_of(value: Mapping[str, Any], names: Names) -> str | None:
    """The format that the row's keys speak for; keys that data.columns names speak first."""
    theirs = {ours: value[key] for ours, key in names.items() if key in value}
    if theirs:
        own = {key: part for key, part in value.items() if key not in names and key not in names.values()}
        likely = [name for name in FORMATS if all(ours in KEYS[name] for ours in names)]
        found = _by_keys({key: part for key, part in (own | theirs).items() if any(key in KEYS[name] for name in likely)})
        return found if found is not None else _by_keys(own | theirs)
    return _by_keys(value)


def _by_keys(value: Mapping[str, Any]) -> str | None:
    for key in TURN_LISTS:
        turns = value.get(key)
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            turns = _from_json(turns)
        if isinstance(turns, list):
            first = next((turn for turn in turns if isinstance(turn, dict)), {})
            return "sharegpt" if "from" in first or "value" in first else "messages"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if "prompt" in value and "completion" in value:
        return "prompt_completion"
    return "text" if "text" in value else None


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _check_columns(rows: Sequence[Row], names: Names) -> None:
    """DataError for each column of data.columns that no row has."""
    there = {key: None for row in rows for key in row.value}
    problems = []
    for ours, theirs in names.items():
        if rows and theirs not in there:
            near = nearest(theirs, there)
            hint = f"--set 'data.columns={{{ours}: {near}}}'" if near else f"the rows have {', '.join(list(there)[:12]) or 'no keys'}"
            message = f'no row has the key "{theirs}", which data.columns.{ours} names'
            problems.append(Problem(code="data.unknown-column", message=message, where=rows[0].where, hint=hint))
    if problems:
        raise DataError(problems)


def _also(value: Mapping[str, Any], name: str, names: Names) -> str:
    """What else the rows could have been read as, for nothing is chosen in silence."""
    if names:
        return ""
    rest = {key: part for key, part in value.items() if key not in TURN_LISTS}
    other = _by_keys(rest) if name in ("messages", "sharegpt") else ("text" if name != "text" and "text" in value else None)
    return f" (--set data.format={other} would read its other keys instead)" if other else ""


def _preference(row: Row) -> Problem | None:
    """The problem of a row that holds answers to be avoided; to learn those would teach the wrong thing."""
    value, hint = row.value, None
    pair = next((pair for pair in _PAIRS if set(pair) <= value.keys()), None)
    if pair is not None:
        what = f"preference pairs ({pair[0]}, {pair[1]})"
        chosen = f"messages: .{pair[0]}" if isinstance(value[pair[0]], list) else f"prompt, completion: .{pair[0]}"
        hint = f"jq -c '{{{chosen}}}' '{row.source}' > chosen.jsonl   learns the chosen answers"
    elif "completion" in value and isinstance(value.get("label"), bool):
        what = "answers labelled good or bad (completion, label)"
        hint = f"jq -c 'select(.label)' '{row.source}' > good.jsonl   learns the good answers"
    elif "completions" in value and "labels" in value:
        what = "steps labelled good or bad (completions, labels)"
    else:
        return None
    return Problem(
        code="data.preference",
        message=f"rows are {what}; this version learns from good answers alone",
        where=row.where,
        excerpt=excerpt(json.dumps(value, ensure_ascii=False), row.line),
        hint=hint,
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
    hint = f"rename {', '.join(renames)}" if renames else 'rename the keys, for example to "prompt" and "completion"'
    within = list_within(row.value)
    if within is not None and (found := _by_keys(row.value[within][0])):
        alone = len(rows) == 1 and ending(row.source) == ".json"
        hint = take_out(row.source, within) if alone else f'the rows ({found}) stand in the list "{within}": write each of them in a line'
    elif within is not None and _by_keys({"messages": row.value[within]}) and {"role", "from"} & row.value[within][0].keys():
        hint = f"--set 'data.columns={{messages: {within}}}'"
    return Problem(
        code="data.unknown-format",
        message=f"the rows are in none of the formats {', '.join(FORMATS)}; the keys here are {keys}",
        where=row.where,
        excerpt=excerpt(json.dumps(row.value, ensure_ascii=False), row.line),
        hint=hint,
    )
