"""Rows with one answer that is labelled good or bad: the format `labelled`.

    {"prompt": "...", "completion": "...", "label": true}         texts, or lists of messages
    {"messages": [..., {"role": "assistant", ...}], "label": 0}   a conversation whose last turn is labelled

The row is read as one of another format without its label. The prompt and earlier answers are never learned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.column_roles import plain_name
from llamahome.data.rows.columns import at_path
from llamahome.data.rows.row_error import RowError, required
from llamahome.data.rows.turns import opened, turn_list

LABELS = ("label", "kto_tag")
"""Keys of the label; the first one that the row has is read."""
_VERDICTS = (
    *("good", "thumbs_up", "thumb_up", "upvoted", "liked", "accepted", "approved"),
    *("acceptable", "correct", "desirable", "preferred", "helpful"),
)
"""Other columns that say whether an answer is good, also with `is_` before; only data.columns makes them labels."""
_GOOD, _BAD = ("true", "1", "1.0", "good", "desirable"), ("false", "0", "0.0", "bad", "undesirable")
_BAD_WORDS = ("false", "bad", "undesirable")

Read = Callable[[Row, Mapping[str, str]], Conversation]
"""Reads a row of another format, with data.columns."""


def label_column(value: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """The column of the label; None if the row has none."""
    if "label" in names:
        return names["label"] if at_path(value, names["label"]) is not None or names["label"] in value else None
    return next((key for key in LABELS if key in value), None)


def verdict_column(rows: Sequence[Row]) -> str | None:
    """A column that by its name says whether the answer is good, and says good or bad in every row and bad in one; None without."""
    first = rows[0].value if rows else {}
    for key in first:
        if isinstance(key, str) and _is_verdict(key):
            try:
                said = {is_good(row.value, key) for row in rows if key in row.value}
                if False in said:
                    return key
            except RowError:
                continue
    return None


def bad_verdict(value: Mapping[str, Any]) -> str | None:
    """A column that by its name says whether the answer is good, and says in words that it is bad; None without.

    0 may number something else. Many rows together can tell (`verdict_column`).
    """
    for key, said in value.items():  # the key first: a value may be a long text
        if isinstance(key, str) and _is_verdict(key) and str(said).strip().lower() in _BAD_WORDS:
            return key
    return None


def _is_verdict(key: str) -> bool:
    return plain_name(key).removeprefix("is_") in _VERDICTS


def is_good(value: Mapping[str, Any], column: str) -> bool:
    """What the label says; a RowError if it is neither good nor bad."""
    label = at_path(value, column)
    written = str(label).strip().lower() if isinstance(label, bool | int | float | str) else ""
    if written in _GOOD:
        return True
    if written in _BAD:
        return False
    shown = repr(label) if isinstance(label, str | int | float) else kind(label)
    message = f"{column} is {shown[:60]}, which says neither good nor bad"
    raise RowError("data.unclear-label", message, hint="write true or false (1 or 0, good or bad), or remove the row")


def read_labelled(row: Row, names: Mapping[str, str], readers: Mapping[str, Read]) -> Conversation:
    """The conversation without the label, `good` as the label says; raises a RowError for what cannot be learned from."""
    column = label_column(row.value, names) or names.get("label", LABELS[0])
    required(row.value, column, path="")
    good = is_good(row.value, column)
    unlabelled = replace(row, value={key: part for key, part in row.value.items() if key != column})
    given = {ours: theirs for ours, theirs in names.items() if ours != "label"}
    format_name = _turns_of(unlabelled.value, given)
    read = readers[format_name or "prompt_completion"](unlabelled, given)
    context = read.context_only
    if format_name is not None:
        if read.turns[-1]["role"] != "assistant":
            message = f"the conversation ends with a {read.turns[-1]['role']} turn, and the label is about an answer"
            raise RowError("data.no-assistant", message, hint="add the answer that the label is about, or remove the row")
        context = frozenset(number for number, turn in enumerate(read.turns[:-1]) if turn["role"] == "assistant")
    return replace(read, row=row, context_only=context, good=good)


def why_labelled(rows: Sequence[Row], names: Mapping[str, str]) -> str | None:
    """Which column holds the labels, and how many of the rows are good; None if no row has one."""
    found = [(row.value, column) for row in rows if (column := label_column(row.value, names)) is not None]
    if not found:
        return None
    good = sum(_says_good(*each) for each in found)
    return f"`{found[0][1]}` says whether the answer is good, and {good:,} of the first {len(found):,} are"


def _says_good(value: Mapping[str, Any], column: str) -> bool:
    try:
        return is_good(value, column)
    except RowError:
        return False


def _turns_of(value: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """The format of the row's list of turns; None if the answer has a column of its own."""
    if "completion" in value or names.keys() & {"prompt", "completion"}:
        return None
    key = turn_list(value, names)
    turns = opened(value.get(key)) if key is not None else None
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else None
    if first is None:
        return None
    return "sharegpt" if "from" in first else "messages"
