"""The format of the rows, found from the keys of the first of them, with the reason; never from the file's name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from llamahome.data.files.commands import list_within
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.records import Row
from llamahome.data.rows.advice import alternative, other_keys, reason, split_column, unknown
from llamahome.data.rows.column_roles import ColumnRoles, find_roles
from llamahome.data.rows.columns import at_path, columns_of, setting, text_paths, with_named
from llamahome.data.rows.formats import FORMATS, KEYS, OWN_NAMES, Names, text_column
from llamahome.data.rows.headerless import is_table, may_lack_names, names_written_before, no_header
from llamahome.data.rows.judged import find_judged, refused, with_label
from llamahome.data.rows.labels import verdict_column, why_labelled
from llamahome.data.rows.nested import nested_rows
from llamahome.data.rows.preferences import described, pair_columns
from llamahome.data.rows.prompts import why_prompts
from llamahome.data.rows.row_error import RowError, nearest, problem_at
from llamahome.data.rows.single_messages import single_messages
from llamahome.data.rows.turns import TURN_LISTS, opened, turn_keys, turn_list
from llamahome.errors import DataError, Problem

SAMPLE = 64
"""Rows that are examined."""


@dataclass(frozen=True)
class DetectedFormat:
    """The name of a format and why the rows are taken to be in it."""

    name: str
    reason: str


def detect(rows: Sequence[Row], format_setting: str, names: Names = OWN_NAMES) -> DetectedFormat:
    """The one format of the first rows, or data.format unless that is "auto". `names` is data.columns.

    Raises DataError if the rows are preference data, of several formats or of none, or if a column in `names` does not exist or is not
    read.
    """
    rows = rows[:SAMPLE]
    _check_columns(rows, names)
    if format_setting == "auto":
        detected = _detect(rows, names)
    elif format_setting == "preference":
        detected = DetectedFormat(format_setting, _why_pairs(rows, names))
    elif format_setting == "labelled":
        detected = DetectedFormat(format_setting, why_labelled(rows, names) or _refuse_unlabelled(rows, names))
    elif format_setting == "prompts":
        why = why_prompts(rows, names)
        detected = DetectedFormat(format_setting, why) if why else _detect(rows, names)
    else:
        detected = DetectedFormat(format_setting, f"data.format is {format_setting}")
    unread = [ours for ours in names if ours not in KEYS[detected.name]]
    if unread:
        message = f"data.columns.{unread[0]} is not read: the rows are in the format {detected.name} ({detected.reason})"
        fitting = [name for name in FORMATS if all(ours in KEYS[name] for ours in names)]
        hint = f"--set data.format={fitting[0]}" if fitting else f"{detected.name} reads {', '.join(KEYS[detected.name])}"
        raise DataError(Problem(code="data.unread-column", message=message, where=rows[0].where if rows else None, hint=hint))
    return detected


def _why_pairs(rows: Sequence[Row], names: Names) -> str:
    """Which columns hold the two answers; DataError if no row has them."""
    named = ((with_named(row.value, names), pair) for row in rows if (pair := pair_columns(row.value, names)))
    found = next(((value, pair) for value, pair in named if set(pair) <= value.keys()), None)
    if found is None:
        keys = ", ".join(f'"{key}"' for key in list(rows[0].value)[:12]) if rows else "none"
        message = f"no row has two answers, chosen and rejected, as preferences are learned from; the keys here are {keys}"
        one = "--set training.objective=sft --set data.format=auto   learns from rows with one answer"
        hint = f"{one}; {setting(prompt='COLUMN', chosen='COLUMN', rejected='COLUMN')}   names the columns of pairs"
        raise DataError(Problem(code="data.no-pairs", message=message, where=rows[0].where if rows else None, hint=hint))
    return described(*found, names)


def _refuse_unlabelled(rows: Sequence[Row], names: Names) -> NoReturn:
    """DataError with what learns from rows without labels."""
    first = rows[0] if rows else None
    keys = ", ".join(f'"{key}"' for key in list(first.value)[:12]) if first else "none"
    message = f"no row has a label that says whether its answer is good; the keys here are {keys}"
    hint = "--set training.objective=sft --set data.format=auto   learns from rows with one answer"
    if first is not None and pair_columns(first.value, names) is not None:
        hint = "--set training.objective=dpo --set data.format=auto   learns from pairs of answers"
    elif first is not None and not names and (verdict := verdict_column(rows)) and (labelled := with_label(first, verdict)) is not None:
        hint = f"{labelled[1]}   takes {verdict} for the label"
    raise DataError(Problem(code="data.no-labels", message=message, where=first.where if first else None, hint=hint))


def _detect(rows: Sequence[Row], names: Names) -> DetectedFormat:
    first_of: dict[str, Row] = {}
    count = 0
    problems: list[Problem] = []
    judged = find_judged(rows, names)
    if judged is not None:
        raise DataError(refused(*judged))
    if not names and (messages := single_messages(rows)) is not None:
        raise DataError(messages)
    for row in rows:
        try:
            name = format_of(with_named(row.value, names), names)
        except RowError as error:
            problems.append(problem_at(row, error))
            continue
        if name is not None:
            first_of.setdefault(name, row)
            count += 1
    if not first_of:
        raise DataError(problems or _unknown(rows))
    if len(first_of) > 1:
        raise DataError(_mixed(first_of))
    name, row = next(iter(first_of.items()))
    which = "every row" if count == len(rows) else f"{count} of the first {len(rows)} rows"
    without_turns = _by_keys(other_keys(row.value)) if name in ("messages", "sharegpt") else None
    value = with_named(row.value, names)
    why = f"{which} {'has' if count in (1, len(rows)) else 'have'} {reason(value, name, names)}" + alternative(
        row.value, name, names, without_turns
    )
    why += split_column(row.value)
    return DetectedFormat(name, f"{why}; the first line names the columns and is no row" if may_lack_names(row) else why)


def format_of(value: Mapping[str, Any], names: Names) -> str | None:
    """The format that the row's keys indicate, first those that data.columns names. `value` includes the texts of templates."""
    renamed = {ours: value[key] for ours, key in names.items() if key in value}
    if not renamed:
        return _by_keys(value)
    others = {key: part for key, part in value.items() if key not in names and key not in names.values()}
    likely = [name for name in FORMATS if all(ours in KEYS[name] for ours in names)]
    with_roles = "prompt_completion" if isinstance(find_roles(value, names), ColumnRoles) else None
    known = {key: part for key, part in (others | renamed).items() if any(key in KEYS[name] for name in likely)}
    name = _by_keys(known) or (with_roles if "prompt_completion" in likely else None) or _by_keys(others | renamed)
    return with_roles if name == "prompt_completion" else name


def _by_keys(value: Mapping[str, Any]) -> str | None:
    key = turn_list(value, OWN_NAMES)
    turns = opened(value[key]) if key is not None else None
    if isinstance(turns, list):
        first = next((turn for turn in turns if isinstance(turn, dict)), {})
        speaker, _ = turn_keys(turns, ("role", "content"))
        return "sharegpt" if "from" in first or "value" in first or speaker != "role" else "messages"
    if "instruction" in value and "output" in value:
        return "alpaca"
    roles = find_roles(value)
    if isinstance(roles, ColumnRoles):
        return "prompt_completion"
    return "text" if not roles.text_is_context and text_column(value) in value else None


def _check_columns(rows: Sequence[Row], names: Names) -> None:
    """DataError with each column of data.columns that no row has."""
    keys = {key: None for row in rows for key in row.value}

    def is_missing(column: str) -> bool:
        return column not in keys and all(at_path(row.value, column) is None for row in rows)

    missing = {ours: [column for column in columns_of(theirs) if is_missing(column)] for ours, theirs in names.items() if rows}
    known = [*keys, *(path for row in rows[:1] for path in text_paths(row.value))]
    corrected = {ours: _corrected(names[ours], columns, known) for ours, columns in missing.items()}
    complete = {ours: theirs for ours, theirs in corrected.items() if theirs is not None}
    problems = []
    for ours, columns in missing.items():
        for column in columns:
            hint = setting(**complete) if ours in complete else f"the rows have {', '.join(list(keys)[:12]) or 'no keys'}"
            message = f'no row has the key "{column}", which data.columns.{ours} names'
            problems.append(Problem(code="data.unknown-column", message=message, where=rows[0].where, hint=hint))
    if problems:
        raise DataError(no_header(rows) or problems)


def _corrected(theirs: str, missing: Sequence[str], keys: Sequence[str]) -> str | None:
    """The value of data.columns with the nearest key instead of each missing one; None if one has no near key."""
    for column in missing:
        near = nearest(column, keys)
        if near is None:
            return None
        theirs = near if theirs == column else theirs.replace(f"{{{column}}}", f"{{{near}}}")
    return theirs


def _mixed(first_of: dict[str, Row]) -> Problem:
    (name, first), (_, second), *_ = first_of.items()
    examples = ", ".join(f"{row.where} is {format_}" for format_, row in first_of.items())
    return Problem(
        code="data.mixed-formats",
        message=f"rows are in {len(first_of)} formats: {examples}",
        where=second.where,
        excerpt=excerpt(json.dumps(second.value, ensure_ascii=False), second.line),
        hint=f"a file for each format; --set data.format={name} reads rows like line {first.line} and lists every other one",
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
    is_turn = bool({"role", "from"} & inner[0].keys()) and turn_keys(inner, ("role", ""))[1] in inner[0]
    nested = nested_rows(rows, _by_keys)
    problem = no_header(rows) or unknown(rows, _by_keys(inner[0]), inner_is_turn=is_turn, nested=nested)
    if problem.code == "data.unknown-format" and (asked := why_prompts(rows, {})):
        message = f"{asked.partition(';')[0]}, and only training.objective grpo learns without one; the keys"
        problem = replace(problem, message=f"{message}{problem.message.rpartition('; the keys')[2]}")
    if problem.code == "data.unknown-format" and is_table(rows[0]):
        unnamed = names_written_before(rows)
        hint = f"{problem.hint}; {unnamed}, if the first line is a row" if problem.hint and unnamed else problem.hint
        problem = replace(problem, message=f"{problem.message} (the first line of the file names them)", hint=hint)
    return problem
