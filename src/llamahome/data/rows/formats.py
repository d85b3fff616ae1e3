"""Rows to conversations: eight formats, and one function for each that reads a row of it.

    messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}
    prompt_completion  {"prompt": "...", "completion": "..."}, or both as lists of messages; also other names (column_roles.py)
    text               {"text": "..."}
    preference         {"prompt": "...", "chosen": "...", "rejected": "..."}: two answers, read in preferences.py
    labelled           {"prompt": "...", "completion": "...", "label": true}: a good or a bad answer, read in labels.py
    prompts            {"prompt": "..."}: no answer, read in prompts.py

What a row lacks is reported with its JSON path and the nearest name. Nothing is guessed that could teach the wrong thing. `names` is the
setting data.columns: under which key of the row one of our keys is, or a template of several keys (columns.py).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.files.jsontext import Unusual, not_finite_at
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.answer_columns import every_answer
from llamahome.data.rows.column_roles import (
    ColumnRoles,
    Unclear,
    answer_beside,
    answer_of,
    context_columns,
    find_roles,
    plain_name,
    system_column,
)
from llamahome.data.rows.columns import setting, text_paths, with_named
from llamahome.data.rows.labels import bad_verdict, read_labelled
from llamahome.data.rows.preferences import read_pair
from llamahome.data.rows.prompts import read_prompt
from llamahome.data.rows.row_error import RowError, content_of, problem_at, required
from llamahome.data.rows.row_parts import Turns, has_history, history_turns, one_system, system_turn, tools_of, with_context
from llamahome.data.rows.toolcalls import as_calls, read_calls
from llamahome.data.rows.turns import (
    MESSAGE_ROLES,
    SHAREGPT_ROLES,
    TURN_LISTS,
    are_pairs,
    are_texts,
    as_turns,
    check_order,
    is_prompt_in_json,
    opened,
    read_turns,
    turn_keys,
    turn_list,
    with_list,
)
from llamahome.errors import Problem

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", **MESSAGE_ROLES}
"""Roles under `role`; the two of sharegpt mean the same there, and `model` is what Gemini calls its own."""
KEYS: Mapping[str, tuple[str, ...]] = {
    "messages": (*TURN_LISTS, "system", "tools"),
    "sharegpt": (*TURN_LISTS, "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_completion": ("prompt", "completion", "system", "tools", "history"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "system", "tools", "history"),
    "labelled": ("prompt", "completion", "label", *TURN_LISTS, "system", "tools", "history"),
    "prompts": ("prompt", *TURN_LISTS, "system", "tools"),
}
"""The keys that each format reads."""
OWN_NAMES: Mapping[str, str] = MappingProxyType({})
ANSWERS = frozenset(("completion", "messages", "conversations", "output", "text"))
"""Keys of data.columns that name what is learned, so that a column beside it does not judge it."""

_PYTHON_ANSWERS = re.compile(r"""\s*(\{\s*'text'\s*:|\[\s*(['"]).*\2\s*\]\s*$|\{\s*'answer_start')""", re.DOTALL)
"""Several answers as Python's str writes them; answers in JSON were read before."""
_PYTHON_TURNS = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")

Names = Mapping[str, str]


def understand(row: Row, format_name: str, names: Names = OWN_NAMES) -> Conversation | Problem:
    """The conversation in the row, or what is wrong with it; never raises because of the data."""
    try:
        value = with_named(row.value, names) if names else row.value
        read = row if value is row.value else replace(row, value=value)
        conversation = _READERS[format_name](read, names)
        if format_name in FORMATS and not names.keys() & ANSWERS and (column := bad_verdict(row.value)) is not None:
            _refuse_bad(row.value, column)
        if isinstance(row.value, Unusual):
            _refuse_not_finite(conversation)
        return conversation if read is row else replace(conversation, row=row)
    except RowError as error:
        if isinstance(error.part, dict) and row.value.keys() <= error.part.keys():
            error.part = None  # the row as it is, without the texts of templates
        return problem_at(row, error)


def _refuse_bad(value: Mapping[str, Any], column: str) -> None:
    """A RowError with what learns the answer that `column` calls bad."""
    roles = find_roles(value)
    answer = turn_list(value, OWN_NAMES) or (roles.completion if isinstance(roles, ColumnRoles) else None)
    if answer is not None:
        message = f"{column} says that this answer is bad, and only good answers are learned here"
        hint = f"remove the row; or {every_answer(value, answer)}   learns every answer, if {column} means another thing"
        raise RowError("data.bad-answer", message, hint=hint)


def _refuse_not_finite(conversation: Conversation) -> None:
    """A RowError if NaN or an infinity is among what was read of the row."""
    for name, part in (("the turns", conversation.turns), ("the tools", conversation.tools)):
        path = not_finite_at(part)
        if path is not None:
            raise RowError("data.bad-json", f"there is NaN or an infinity in {name}, at {path}; neither is a JSON value")


def _listed(row: Row, names: Names, *, keys: tuple[str, str], roles: dict[str, str]) -> Conversation:
    path = turn_list(row.value, names) or (TURN_LISTS[0] if keys[0] == "role" else TURN_LISTS[1])
    written = required(row.value, path, path="")
    listed = opened(written)
    first = listed[0] if isinstance(listed, list) and listed else None
    if not (isinstance(first, dict) and keys[0] in first and keys[1] in first):  # nearly all turns have both keys
        if isinstance(listed, list) and (are_texts(path, listed) or are_pairs(path, listed)):
            written, keys, roles = as_turns(listed, path=path), ("role", "content"), MESSAGE_ROLES
        else:
            keys = turn_keys(listed, keys)
    turns, context_only = read_turns(written if isinstance(written, str | list) else listed, path=path, keys=keys, roles=roles)
    if not names and turns[-1]["role"] != "assistant" and keys == ("role", "content") and (answer := answer_beside(row.value, path)):
        message = f"the turns end with a {turns[-1]['role']} turn, and the answer to it seems to be in {answer['completion']}"
        raise RowError("data.no-assistant", message, hint=setting(**answer))
    system = system_turn(row.value, names or {"system": system_column(row.value) or "system"})
    if system and turns[0]["role"] == "system":
        system = one_system(system, turns, path)
    if system:
        context_only = frozenset(number + 1 for number in context_only)
    return _conversation(row, system + turns, path=path, offset=len(system), context_only=context_only, tools=tools_of(row.value, names))


def _alpaca(row: Row, names: Names) -> Conversation:
    value = row.value
    turns = system_turn(value, names or {"system": system_column(value) or "system"})
    history = history_turns(value, names)
    if history and history[0]["role"] == "system":
        turns = one_system(tuple(turns), history, "history")
    turns += history
    question = content_of(value, names.get("instruction", "instruction"), path="")
    context = dict.fromkeys((names.get("input", "input"), *(() if names else context_columns(value))))
    user = {"role": "user", "content": with_context(question, value, context)}
    answer = {"role": "assistant", "content": content_of(value, names.get("output", "output"), path="")}
    return _conversation(row, (*turns, user, answer), path="")


def _prompt_completion(row: Row, names: Names) -> Conversation:
    roles = find_roles(row.value, names)
    if isinstance(roles, Unclear):
        if roles.why:
            raise RowError("data.unclear-columns", f"{roles.why}; set data.columns to choose")
        question, answer = (next(iter(roles.candidates[role]), names.get(role, role)) for role in ("prompt", "completion"))
        roles = ColumnRoles(question, answer, next(iter(roles.candidates["system"]), None))
    ours, theirs = roles.prompt, roles.completion
    prompt = with_list(_opened_prompt(required(row.value, ours, path=""), ours))
    required(row.value, theirs, path="")
    completion = with_list(answer_of(row.value, theirs))
    if isinstance(prompt, list) and isinstance(row.value[ours], str):
        completion = opened(completion)
    tools, system = tools_of(row.value, names), system_turn(row.value, {**names, "system": roles.system or "system"})
    if (names or theirs != "completion") and isinstance(prompt, list) != isinstance(completion, list):
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": content_of(row.value, ours, path="")}]
        completion = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = read_turns(prompt, path=ours, keys=("role", "content"), roles=MESSAGE_ROLES)
        after, weightless = read_turns(completion, path=theirs, keys=("role", "content"), roles=MESSAGE_ROLES)
        before = (one_system(system, before, ours) if before[0]["role"] == "system" else system) + before
        context = frozenset(range(len(before))) | frozenset(number + len(before) for number in weightless)
        return _conversation(row, before + after, path="", context_only=context, tools=tools)
    if isinstance(prompt, list) != isinstance(completion, list):
        message = f"{ours} is {kind(prompt)} but {theirs} is {kind(completion)}; both must be strings or both lists"
        columns = {**({"system": roles.system} if roles.system else {}), "prompt": ours, "completion": theirs}
        hint = f"{setting(**columns)}   takes the string for the answer" if isinstance(prompt, list) else None
        raise RowError("data.wrong-type", message, hint=hint)
    _refuse_object({ours: prompt, theirs: completion})
    question = with_context(content_of(row.value, ours, path=""), row.value, roles.context)
    history = history_turns(row.value, names) if has_history(row.value, names) else ()
    if history and history[0]["role"] == "system":
        system = one_system(system, history, "history")
    turns = ({"role": "user", "content": question}, _answer({**row.value, theirs: completion}, theirs, tools=tools))
    return _conversation(row, system + history + turns, path="", tools=tools)


def _refuse_object(columns: Mapping[str, Any]) -> None:
    """A RowError if a column is an object, with the paths to the texts in it, which data.columns can name."""
    for key, cell in columns.items():
        if isinstance(cell, dict) and (paths := text_paths({key: cell})):
            hint = f"write the text itself as a string, or name it in data.columns; texts within: {', '.join(paths[:6])}"
            raise RowError("data.wrong-type", f"{key} is an object, not a string", part={key: cell}, hint=hint)


def _opened_prompt(prompt: Any, key: str) -> Any:
    """The turns of a prompt that is their JSON text, as tables write it; a RowError if it is written in Python's notation."""
    if isinstance(prompt, str) and _PYTHON_TURNS.match(prompt):
        raise RowError("data.wrong-type", f"{key} is a list in Python's notation; json.dumps writes one that is read")
    return opened(prompt) if is_prompt_in_json(prompt) else prompt


def _answer(value: Mapping[str, Any], key: str, *, tools: Turns) -> dict[str, Any]:
    """The assistant's turn: the text, or its calls if the row defines tools and the text is a JSON list of calls."""
    if isinstance(value[key], int | float) and math.isfinite(value[key]):
        hint = f"{setting(completion=f'{{{key}}}')}   writes it as text"
        raise RowError("data.wrong-type", f"{key} is {kind(value[key])}, not a string", hint=hint)
    text = content_of(value, key, path="")
    if plain_name(key) == "answers" and _PYTHON_ANSWERS.match(text):
        raise RowError("data.wrong-type", f"{key} is a list or an object in Python's notation; json.dumps writes one that is read")
    calls = as_calls(text) if tools and key != "completion" else None
    return {"role": "assistant", "content": text} if calls is None else {"role": "assistant", "tool_calls": read_calls(calls, path=key)}


def _text(row: Row, names: Names) -> Conversation:
    return Conversation(row=row, text=content_of(row.value, text_column(row.value, names), path=""))


def text_column(value: Mapping[str, Any], names: Names = OWN_NAMES) -> str:
    """The key of a plain text: `text` in any capitalisation."""
    if "text" in names or "text" in value:
        return names.get("text", "text")
    return next((key for key in value if isinstance(key, str) and plain_name(key) == "text"), "text")


def _conversation(
    row: Row,
    turns: Turns,
    *,
    path: str,
    offset: int = 0,
    context_only: frozenset[int] = frozenset(),
    tools: tuple[dict[str, Any], ...] = (),
) -> Conversation:
    """The conversation, if its turns are in order and one is learned; the first `offset` turns are not from the list at `path`."""
    check_order(turns, path=path, offset=offset)
    if not context_only and turns and turns[-1]["role"] == "assistant":  # as in most rows, where sets of numbers would cost time
        return Conversation(row, turns, None, context_only, tools)
    answers = frozenset([number for number, turn in enumerate(turns) if turn["role"] == "assistant"])
    if not answers - context_only:
        roles = ", ".join(turn["role"] for turn in turns)
        message = "every assistant turn has weight 0, so nothing would be learned" if answers else f"no assistant turn, only {roles}"
        raise RowError("data.no-assistant", message, hint="add the answer that is to be learned, or remove the row")
    return Conversation(row, turns, None, context_only & answers, tools)


_READERS: dict[str, Callable[[Row, Names], Conversation]] = {
    "messages": partial(_listed, keys=("role", "content"), roles=_ROLES),
    "sharegpt": partial(_listed, keys=("from", "value"), roles=SHAREGPT_ROLES),
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "preference": lambda row, names: read_pair(row, names, _READERS),
    "labelled": lambda row, names: read_labelled(row, names, _READERS),
    "prompts": lambda row, names: read_prompt(row, names, _READERS),
}
FORMATS: Sequence[str] = tuple(name for name in _READERS if name not in ("preference", "labelled", "prompts"))
"""The formats that are found by their keys; the others are read because an objective needs them."""
