"""Which format the rows are in, found from the first of them, with the reason; never from the file's name."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.kinds import ending, list_within
from llamahome.data.records import Row
from llamahome.data.rows.advice import good_answers, setting, unknown
from llamahome.data.rows.columns import columns_of, with_templates
from llamahome.data.rows.fault import Finding, nearest, problem_at
from llamahome.data.rows.formats import FORMATS, KEYS, OWN_NAMES, Names, parts_of, text_column
from llamahome.data.rows.parts import Parts
from llamahome.data.rows.reasons import also, reason, without_turns
from llamahome.data.rows.turnlists import TURN_LISTS, from_text, spelled, turn_list
from llamahome.errors import DataError, Problem

SAMPLE = 64
"""Rows that are looked at."""

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
    firsts: dict[str, Row] = {}
    count = 0
    refused: list[Problem] = []
    for row in rows:
        problem = _preference(row, names)
        if problem is not None:
            raise DataError(problem)
        try:
            name = _format_of(with_templates(row.value, names), names)
        except Finding as finding:
            refused.append(problem_at(row, finding))
            continue
        if name is not None:
            firsts.setdefault(name, row)
            count += 1
    if not firsts:
        raise DataError(refused or _unknown(rows))
    if len(firsts) > 1:
        raise DataError(_mixed(firsts))
    name, row = next(iter(firsts.items()))
    many = "every row" if count == len(rows) else f"{count} of the first {len(rows)} rows"
    other = _by_keys(without_turns(row.value)) if name in ("messages", "sharegpt") else None
    value = with_templates(row.value, names)
    return DetectedFormat(name, f"{many} has {reason(value, name, names)}" + also(row.value, name, names, other))


def _format_of(value: Mapping[str, Any], names: Names) -> str | None:
    """The format that the row's keys speak for; keys that data.columns names speak first. `value` has what templates made."""
    theirs = {ours: value[key] for ours, key in names.items() if key in value}
    if theirs:
        own = {key: part for key, part in value.items() if key not in names and key not in names.values()}
        likely = [name for name in FORMATS if all(ours in KEYS[name] for ours in names)]
        found = _by_keys({key: part for key, part in (own | theirs).items() if any(key in KEYS[name] for name in likely)})
        asked = "prompt_completion" if isinstance(parts_of(value, names), Parts) else None
        if found is None and "prompt_completion" in likely:
            found = asked
        found = found or _by_keys(own | theirs)
        return asked if found == "prompt_completion" else found
    return _by_keys(value)


def _by_keys(value: Mapping[str, Any]) -> str | None:
    key = turn_list(value, OWN_NAMES)
    turns = from_text(value[key]) if key is not None else None
    if isinstance(turns, list):
        first = next((turn for turn in turns if isinstance(turn, dict)), {})
        speaker, _ = spelled(turns, ("role", "content"))
        return "sharegpt" if "from" in first or "value" in first or speaker != "role" else "messages"
    if "instruction" in value and "output" in value:
        return "alpaca"
    parts = parts_of(value)
    if isinstance(parts, Parts):
        return "prompt_completion"
    if parts.text_is_context:
        return None
    return "text" if text_column(value) in value else None


def _check_columns(rows: Sequence[Row], names: Names) -> None:
    """DataError for each column of data.columns that no row has."""
    there = {key: None for row in rows for key in row.value}
    wrong = {ours: [column for column in columns_of(theirs) if column not in there] for ours, theirs in names.items() if rows}
    mended = {ours: _mended(theirs, wrong[ours], there) for ours, theirs in names.items() if rows}
    whole = {ours: theirs for ours, theirs in mended.items() if theirs is not None}
    problems = []
    for ours, columns in wrong.items():
        for column in columns:
            hint = setting(**whole) if ours in whole else f"the rows have {', '.join(list(there)[:12]) or 'no keys'}"
            message = f'no row has the key "{column}", which data.columns.{ours} names'
            problems.append(Problem(code="data.unknown-column", message=message, where=rows[0].where, hint=hint))
    if problems:
        raise DataError(problems)


def _mended(theirs: str, wrong: Sequence[str], there: Mapping[str, Any]) -> str | None:
    """The value of data.columns with the nearest column for each that is not there; None where there is none near."""
    for column in wrong:
        near = nearest(column, there)
        if near is None:
            return None
        theirs = near if theirs == column else theirs.replace(f"{{{column}}}", f"{{{near}}}")
    return theirs


def _preference(row: Row, names: Names) -> Problem | None:
    """The problem of a row that holds answers to be avoided; those would teach the wrong thing, and data.columns names the good."""
    if names.keys() & {"completion", "messages", "conversations", "output", "text"}:
        return None
    value, hint = row.value, None
    pair = next((pair for pair in _PAIRS if set(pair) <= value.keys()), None)
    if pair is not None:
        what = f"preference pairs ({pair[0]}, {pair[1]})"
        good = good_answers(value, pair[0])
        hint = f"{good}   learns the better answers alone" if good else None
    elif "completion" in value and isinstance(value.get("label"), bool):
        what = "answers labelled good or bad (completion, label)"
        lines = ending(row.source) in (".jsonl", ".ndjson")
        target = Path(row.source).with_name(f"{Path(row.source).stem}-good.jsonl")
        command = f"jq -c 'select(.label) | del(.label)' {shlex.quote(row.source)} > {shlex.quote(str(target))}"
        hint = f"{command}   learns the good answers" if lines else None
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
    value = rows[0].value
    for key in TURN_LISTS:
        if isinstance(value.get(key), str) and value[key].lstrip().startswith("["):
            message = f"{key} holds a list as text that is not JSON; json.dumps writes it, Python's str does not"
            shown = excerpt(json.dumps(value, ensure_ascii=False), rows[0].line)
            return Problem(code="data.wrong-type", message=message, where=rows[0].where, excerpt=shown)
    within = list_within(value)
    inner = value[within] if within is not None else [{}]
    turns = bool({"role", "from"} & inner[0].keys()) and spelled(inner, ("role", ""))[1] in inner[0]
    return unknown(rows, _by_keys(inner[0]), turns_within=turns)
