"""Recognises rows with answers to be avoided, from which learning all answers would teach the wrong thing: pairs, and labelled answers.

A label counts if every row has one that says good or bad. 0 and 1 also number classes, so they count only under `kto_tag`, beside a
`completion` or beside turns. Rows of which data.columns names the answer are like any other rows.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.kinds import ending
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.answer_columns import every_answer, role_columns, turn_columns
from llamahome.data.rows.column_roles import COMPLETION, ColumnRoles, Unclear, find_roles, plain_name
from llamahome.data.rows.columns import Names, setting
from llamahome.data.rows.formats import ANSWERS, OWN_NAMES, understand
from llamahome.data.rows.labels import is_good, label_column, verdict_column
from llamahome.data.rows.preferences import pair_columns
from llamahome.data.rows.row_error import RowError
from llamahome.data.rows.turns import opened, turn_list
from llamahome.errors import Problem


@dataclass(frozen=True)
class Judged:
    """Rows with answers to be avoided, which would teach the wrong thing if all answers were learned."""

    what: str
    learns: str | None
    """The setting that learns from good and bad answers, with what it does; None if none can."""
    good: str | None
    """What leaves only the good answers: a setting, or a command that writes them; None if that is not known."""
    every: str | None = None
    """The setting that learns all answers alike, if the label may mean something else."""


def find_judged(rows: Sequence[Row], names: Names) -> tuple[Row, Judged] | None:
    """The first row with answers to be avoided, and what it holds; None if there is none."""
    if names.keys() & ANSWERS:
        return None
    return next(((row, found) for row in rows if (found := _judged(row, rows)) is not None), None)


def judged_problem(row: Row, found: Judged, *, code: str, why: str, hint: str | None) -> Problem:
    """The problem of a row with answers to be avoided."""
    shown = excerpt(json.dumps(row.value, ensure_ascii=False), row.line)
    return Problem(code=code, message=f"rows are {found.what}, and {why}", where=row.where, excerpt=shown, hint=hint)


def refused(row: Row, found: Judged) -> Problem:
    """The problem where only good answers are learned."""
    only = "learns only the better ones" if found.good and found.good.startswith("--set") else "learns the good answers"
    parts = (found.learns, f"{found.good}   {only}" if found.good else None, found.every)
    hint = "; ".join(part for part in parts if part) or None
    return judged_problem(row, found, code="data.preference", why="only good answers are learned here", hint=hint)


def _judged(row: Row, rows: Sequence[Row]) -> Judged | None:
    value = row.value
    pair = pair_columns(value, OWN_NAMES)
    if pair is not None:
        learns = "--set training.objective=dpo   learns from both answers"
        readable = isinstance(understand(row, "preference"), Conversation)
        return Judged(f"preference pairs ({pair[0]}, {pair[1]})", learns if readable else None, _good_answers(value, pair[0]))
    column = label_column(value, OWN_NAMES)
    if column is not None and (answer := _labelled_answer(value, column)) is not None and _all_say(rows, column):
        learns = "--set training.objective=kto   learns from good and bad answers"
        readable = isinstance(understand(row, "labelled"), Conversation)
        every = (
            None
            if isinstance(value[column], bool)
            else f"{every_answer(value, answer)}   learns every answer, if {column} means another thing"
        )
        what = f"answers labelled good or bad ({answer}, {column})"
        return Judged(what, learns if readable else None, _write_good(row, rows, column), every)
    if column is None and (verdict := verdict_column(rows)) is not None and (labelled := with_label(row, verdict)) is not None:
        answer, mapping = labelled
        learns = f"--set training.objective=kto {mapping}   learns from good and bad answers"
        every = f"{every_answer(value, answer)}   learns every answer, if {verdict} means another thing"
        return Judged(f"answers of which {verdict} says whether they are good", learns, _write_good(row, rows, verdict), every)
    if "completions" in value and "labels" in value:
        return Judged("steps labelled good or bad (completions, labels)", None, None)
    return None


def with_label(row: Row, column: str) -> tuple[str, str] | None:
    """The column of the answer that the label in `column` is about, and the setting that reads both; None if there is no answer."""
    answer, roles = _labelled_answer(row.value, column), find_roles(row.value)
    if answer is None:
        return None
    in_column = isinstance(roles, ColumnRoles) and answer == roles.completion and roles
    columns = role_columns(in_column, answer) if in_column else turn_columns(row.value, answer)
    columns["label"] = column
    return (answer, setting(**columns)) if isinstance(understand(row, "labelled", columns), Conversation) else None


def _labelled_answer(value: Mapping[str, Any], column: str) -> str | None:
    """The column of the answer that the label is about; None if there is no answer or the label may be the number of a class."""
    turns = turn_list(value, OWN_NAMES)
    if turns is not None and isinstance(opened(value[turns]), list):
        return turns
    roles = find_roles(value)
    if not isinstance(roles, ColumnRoles):
        return None
    is_class = column == "label" and str(value[column]).strip() in ("0", "1", "0.0", "1.0") and not isinstance(value[column], bool)
    return None if is_class and roles.completion != "completion" else roles.completion


def _all_say(rows: Sequence[Row], column: str) -> bool:
    """Whether every row with the column says good or bad there."""
    try:
        return all(is_good(row.value, column) in (True, False) for row in rows if column in row.value)
    except RowError:
        return False


def _write_good(row: Row, rows: Sequence[Row], column: str) -> str | None:
    """The command that writes the rows with a good label; None for other files than JSON lines, and for labels of several spellings."""
    good = {json.dumps(each.value[column]) for each in rows if column in each.value and is_good(each.value, column)}
    if ending(row.source) not in (".jsonl", ".ndjson") or len(good) > 1:
        return None
    target = Path(row.source).with_name(f"{Path(row.source).stem}-good.jsonl")
    spelled = next(iter(good), "true")
    key = f".{column}" if re.fullmatch(r"[A-Za-z_]\w*", column, re.ASCII) else f".[{json.dumps(column)}]"
    wanted = key if spelled == "true" else f"{key} == {spelled}"
    command = f"jq -c {shlex.quote(f'select({wanted}) | del({key})')} {shlex.quote(row.source)} > {shlex.quote(str(target))}"
    return command if Path(row.source).suffix.lower() in (".jsonl", ".ndjson") else None


def _good_answers(value: Mapping[str, Any], chosen: str) -> str | None:
    """The setting that learns only the better answers of preference pairs; None if their prompt is not known."""
    answer = value[chosen]
    if isinstance(answer, list):
        first = answer[0].get("role", answer[0].get("from")) if answer and isinstance(answer[0], dict) else None
        if first != "assistant" or not isinstance(value.get("prompt"), list):
            return setting(**turn_columns(value, chosen)) if first in ("user", "human", "system") else None
    questions = {key: part for key, part in value.items() if plain_name(key) not in COMPLETION}
    roles = find_roles(questions, {"completion": chosen})
    return None if isinstance(roles, Unclear) else setting(**role_columns(roles, chosen))
