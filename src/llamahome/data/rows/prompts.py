"""Rows with a prompt and no answer, for an objective whose answers the model gives itself: the format `prompts`.

    {"prompt": "..."}                                           a text, or a list of messages that ends with a question
    {"messages": [..., {"role": "user", "content": "..."}]}

The reference of such a row is empty. Among such rows, one with an answer is read as in the other formats.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.column_roles import ColumnRoles, answer_beside, context_columns, find_roles, system_column
from llamahome.data.rows.columns import with_named
from llamahome.data.rows.row_error import RowError, content_of
from llamahome.data.rows.row_parts import one_system, system_turn, tools_of, with_context
from llamahome.data.rows.turns import (
    ASKING,
    MESSAGE_ROLES,
    SHAREGPT_ROLES,
    check_order,
    opened,
    read_turns,
    turn_keys,
    turn_list,
    with_list,
)

_ROLES = {**SHAREGPT_ROLES, **MESSAGE_ROLES}
Read = Callable[[Row, Mapping[str, str]], Conversation]
"""Reads a row of another format, with data.columns."""


def why_prompts(rows: Sequence[Row], names: Mapping[str, str]) -> str | None:
    """Where the prompts are, if no row has an answer; None if one has, or if no row has a prompt."""
    columns: dict[str, int] = {}
    for row in rows:
        try:
            value = with_named(row.value, names)
        except RowError:
            continue
        column = prompt_column(value, names)
        if column is not None:
            columns[column] = columns.get(column, 0) + 1
        elif _has_answer(value, names):
            return None
    if not columns:
        return None
    which = "every row has" if sum(columns.values()) == len(rows) else f"{sum(columns.values())} of the first {len(rows)} rows have"
    listed = " or ".join(f"`{column}`" for column in columns)
    return f"{which} {listed} and no answer; none is held out, unless data.eval_split says how many"


def prompt_column(value: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """The column of the prompt of a row without an answer; None for other rows."""
    key = turn_list(value, names)
    if key is not None and (turns := opened(value.get(key))):
        return key if _asks(turns) and answer_beside(value, key) is None else None
    roles = find_roles(value, names)
    if isinstance(roles, ColumnRoles) or roles.candidates["completion"] or len(roles.candidates["prompt"]) != 1:
        return None
    column = roles.candidates["prompt"][0]
    return column if isinstance(value.get(column), str) or _asks(_turns_of(value.get(column))) else None


def read_prompt(row: Row, names: Mapping[str, str], readers: Mapping[str, Read]) -> Conversation:
    """The turns up to an answer that is not there; raises a RowError for a row with neither a prompt nor an answer."""
    value, key = row.value, prompt_column(row.value, names)
    if key is None:
        return readers["prompt_completion" if turn_list(value, names) is None else "messages"](row, names)
    system, written = system_turn(value, names or {"system": system_column(value) or "system"}), _turns_of(value[key])
    if isinstance(written, list):
        turns, _ = read_turns(written, path=key, keys=turn_keys(written, ("role", "content")), roles=_ROLES)
        system = one_system(system, turns, key) if turns[0]["role"] == "system" else system
    else:
        context = () if "prompt" in names else context_columns(value)
        turns = ({"role": "user", "content": with_context(content_of(value, key, path=""), value, context)},)
    asked = system + turns
    check_order(asked, path=key, offset=len(system))
    earlier = frozenset(number for number, turn in enumerate(asked) if turn["role"] == "assistant")
    return Conversation(row, asked, None, earlier, tools_of(value, names))


def _turns_of(prompt: object) -> object:
    """The turns of a prompt that is a list, its JSON text, or one message; other prompts as they are."""
    turns = opened(with_list(prompt))
    return turns if _asks(turns) else prompt


def _asks(turns: object) -> bool:
    """Whether these are turns of which the last one asks."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return False
    speaker, text = turn_keys(turns, ("role", "content"))
    return text in turns[-1] and turns[-1].get(speaker) in ASKING


def _has_answer(value: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    return turn_list(value, names) is not None or isinstance(find_roles(value, names), ColumnRoles)
