"""Rows with two answers to one prompt, of which one is better: the format `preference`.

    {"prompt": "...", "chosen": "...", "rejected": "..."}                 texts, or lists of messages
    {"chosen": [{"role": "user", ...}, ...], "rejected": [...]}           whole conversations that begin alike

Each answer is read as a row of another format would be, with the prompt that the row has. What both conversations begin with is the
prompt, and is never learned; what differs is the answer, and must begin with an assistant turn. Other spellings: pair_spellings.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.column_roles import plain_name
from llamahome.data.rows.pair_spellings import spelled_out
from llamahome.data.rows.row_error import RowError, required
from llamahome.data.rows.turns import opened

PAIRS = (
    ("chosen", "rejected"),
    ("accepted", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred", "dispreferred"),
    ("preferred_output", "non_preferred_output"),
)
"""Keys of the better and the worse answer."""
_OPPOSITES = {
    "chosen": ("rejected", "reject", "unchosen"),
    "accepted": ("rejected",),
    "selected": ("rejected",),
    "preferred": ("rejected", "dispreferred", "nonpreferred", "unpreferred"),
    "better": ("worse",),
    "best": ("worst",),
    "good": ("bad",),
    "win": ("lose", "loss"),
    "winning": ("losing",),
    "winner": ("loser",),
    "desirable": ("undesirable",),
}
"""Words that tell the better from the worse answer in two names that are the same otherwise: `chosen_answer` and `rejected_answer`."""
_ABOUT_ANSWERS = frozenset(
    ("model", "id", "score", "rating", "source", "reason", "rank", "type", "label", "index", "name", "category", "key")
)
"""Words in the names of columns that say something about the answers."""

Read = Callable[[Row, Mapping[str, str]], Conversation]
"""Reads a row of another format, with data.columns."""


def pair_columns(value: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, str] | None:
    """The columns of the better and the worse answer; None if the row has not both."""
    if "chosen" in names or "rejected" in names:
        return names.get("chosen", "chosen"), names.get("rejected", "rejected")
    return next((pair for pair in PAIRS if set(pair) <= value.keys()), None) or _opposite_columns(value)


def _opposite_columns(value: Mapping[str, Any]) -> tuple[str, str] | None:
    """Two columns of answers whose names differ in one word and mean better and worse."""
    plain = {plain_name(key): key for key, cell in value.items() if isinstance(key, str) and isinstance(cell, str | list | dict)}
    for name, key in plain.items():
        words = name.split("_")
        for place, word in enumerate(words):
            for opposite in _OPPOSITES.get(word, ()) if _ABOUT_ANSWERS.isdisjoint(words) else ():
                other = plain.get("_".join((*words[:place], opposite, *words[place + 1 :])))
                if other is not None:
                    return key, other
    return None


def whole_conversations(value: Mapping[str, Any], column: str) -> str | None:
    """The format of the list of turns that `column` holds with the prompt in it; None if it holds an answer alone."""
    turns = opened(value.get(column))
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    speaker = first.get("role", first.get("from"))
    if speaker is None or speaker in ("assistant", "gpt", "model"):
        return None
    return "messages" if "role" in first else "sharegpt"


def described(value: Mapping[str, Any], columns: tuple[str, str], names: Mapping[str, str]) -> str:
    """What the two columns of a row hold."""
    better, worse = columns
    if whole_conversations(value, better) is None and isinstance(value.get(better), dict):
        return f"`{better}` and `{worse}` are the answers to the turns beside them"
    if whole_conversations(spelled_out(value, columns, names), better) is not None:
        return f"`{better}` and `{worse}` are conversations that begin alike"
    return f"`{better}` and `{worse}` are the answers to one prompt"


def read_pair(row: Row, names: Mapping[str, str], readers: Mapping[str, Read]) -> Conversation:
    """The better answer as `turns`, the worse one as `other`; raises a RowError for what no pair can be learned from."""
    columns = pair_columns(row.value, names) or PAIRS[0]
    for column in columns:
        required(row.value, column, path="")
    row = replace(row, value=spelled_out(row.value, columns, names))
    better, worse = (_read_side(row, column, columns, names, readers) for column in columns)
    common = 0
    while common < min(len(better.turns), len(worse.turns)) and better.turns[common] == worse.turns[common]:
        common += 1
    for side, column in ((better, columns[0]), (worse, columns[1])):
        rest = side.turns[common:]
        if better.turns == worse.turns:
            message = f"{columns[0]} and {columns[1]} are the same answer, so nothing can be learned from the pair"
            raise RowError("data.equal-answers", message, hint="remove the row")
        if rest and rest[0]["role"] != "assistant":
            message = f"{columns[0]} and {columns[1]} answer different prompts: they differ from turn {common}, a {rest[0]['role']} turn"
            raise RowError("data.different-prompts", message, hint="both must begin with the same turns, up to the answer")
        if not rest or rest[-1]["role"] != "assistant":
            raise RowError("data.no-assistant", f"{column} does not end with an answer", hint="add the answer, or remove the row")
    context = frozenset(number for number in range(common) if better.turns[number]["role"] == "assistant")
    return Conversation(row, better.turns, None, context, better.tools, other=worse.turns)


def _read_side(row: Row, column: str, columns: tuple[str, str], names: Mapping[str, str], readers: Mapping[str, Read]) -> Conversation:
    value = {key: part for key, part in row.value.items() if key == column or key not in columns}
    given = {ours: theirs for ours, theirs in names.items() if ours not in ("chosen", "rejected")}
    format_name = whole_conversations(value, column)
    if format_name is not None:
        return readers[format_name](replace(row, value=value), {**given, "messages": column, "conversations": column})
    if isinstance(value.get(column), int | float):
        hint = "write it as a string in the file, or remove the row"
        raise RowError("data.wrong-type", f"{column} is {kind(value[column])}, not a string", hint=hint)
    try:
        return readers["prompt_completion"](replace(row, value=value), {**given, "completion": column})
    except RowError as error:
        if error.code != "data.missing-key" or error.hint is not None:
            raise
        raise _without_prompt(error, columns) from error


def _without_prompt(error: RowError, columns: tuple[str, str]) -> RowError:
    """The error for a pair of answers whose question is not there under its usual names."""
    message = error.message.partition("; it has")[0] + f" beside {columns[0]} and {columns[1]}, which are answers to it"
    hint = "--set 'data.columns={prompt: COLUMN}' names it; or write two lists of messages that begin with it"
    return RowError("data.missing-key", message, hint=hint)
