"""Rows to conversations: which of five formats the rows are in, and one function per format that understands a row of it.

    messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}
    prompt_completion  {"prompt": "...", "completion": "..."}, or both as lists of messages; and the other usual names (parts.py)
    text               {"text": "..."}

What a row lacks is said with its JSON path and the nearest name. Nothing is guessed that could teach the wrong thing. `names` (the setting
data.columns) says under which key of theirs a key of ours is found, or how a text is made of their keys (columns.py).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.files.jsontext import Unusual, not_finite_at
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.columns import with_templates
from llamahome.data.rows.fault import Finding, content_of, problem_at, required
from llamahome.data.rows.parts import Parts, Unclear, about_of, answer_of, find_parts, plain_name, system_of
from llamahome.data.rows.toolcalls import as_calls, read_calls, read_definitions
from llamahome.data.rows.turnlists import TURN_LISTS, are_pairs, are_texts, as_turns, from_text, spelled, turn_list
from llamahome.data.rows.turns import CALLING_ROLES, check_order, read_turns
from llamahome.errors import Problem

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    **dict.fromkeys(CALLING_ROLES, "assistant"),
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
MESSAGE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
KEYS: Mapping[str, tuple[str, ...]] = {
    "messages": (*TURN_LISTS, "system", "tools"),
    "sharegpt": (*TURN_LISTS, "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_completion": ("prompt", "completion", "system", "tools", "history"),
    "text": ("text",),
}
"""What each format reads of a row."""
OWN_NAMES: Mapping[str, str] = MappingProxyType({})

_PYTHON_ANSWERS = re.compile(r"""\s*(\{\s*'text'\s*:|\[\s*(['"]).*\2\s*\]\s*$|\{\s*'answer_start')""", re.DOTALL)
"""The beginning of what Python's str writes of several answers; JSON of them was read before."""

Names = Mapping[str, str]
Turns = tuple[dict[str, Any], ...]


def understand(row: Row, format_name: str, names: Names = OWN_NAMES) -> Conversation | Problem:
    """The conversation that the row holds, or what is wrong with it; never raises on data."""
    try:
        value = with_templates(row.value, names) if names else row.value
        read = row if value is row.value else replace(row, value=value)
        found = _READERS[format_name](read, names)
        if isinstance(row.value, Unusual):
            _refuse_not_finite(found)
        return found if read is row else replace(found, row=row)
    except Finding as finding:
        return problem_at(row, finding)


def _refuse_not_finite(found: Conversation) -> None:
    """A Finding when NaN or an infinity is among what was read of the row."""
    for name, part in (("the turns", found.turns), ("the tools", found.tools)):
        path = not_finite_at(part)
        if path is not None:
            raise Finding("data.bad-json", f"NaN or an infinity stands in {name}, at {path}; neither is a JSON value")


def _messages(row: Row, names: Names) -> Conversation:
    return _listed(row, names, keys=("role", "content"), roles=MESSAGE_ROLES)


def _sharegpt(row: Row, names: Names) -> Conversation:
    return _listed(row, names, keys=("from", "value"), roles=SHAREGPT_ROLES)


def _listed(row: Row, names: Names, *, keys: tuple[str, str], roles: dict[str, str]) -> Conversation:
    path = turn_list(row.value, names) or (TURN_LISTS[0] if keys[0] == "role" else TURN_LISTS[1])
    listed = required(row.value, path, path="")
    opened = from_text(listed)
    if isinstance(opened, list) and (are_texts(path, opened) or are_pairs(path, opened)):
        listed, keys, roles = as_turns(opened, path=path), ("role", "content"), MESSAGE_ROLES
    else:
        keys = spelled(opened, keys)
    turns, silent = read_turns(listed, path=path, keys=keys, roles=roles)
    first = _system(row.value, names)
    if first and turns[0]["role"] == "system":
        first = _one_system(first, turns, path)
    if first:
        silent = frozenset(number + 1 for number in silent)
    return _conversation(row, first + turns, path=path, offset=len(first), context_only=silent, tools=_tools(row.value, names))


def _system(value: Mapping[str, Any], names: Names) -> Turns:
    """The system turn that the row gives beside its turns."""
    key = names.get("system", "system")
    if value.get(key) in (None, ""):
        return ()
    return ({"role": "system", "content": content_of(value, key, path="")},)


def _tools(value: Mapping[str, Any], names: Names) -> tuple[dict[str, Any], ...]:
    for key in (names.get("tools", "tools"), "functions"):
        if value.get(key):
            return read_definitions(value[key], path=key)
    return ()


def _alpaca(row: Row, names: Names) -> Conversation:
    value = row.value
    turns = _system(value, names or {"system": system_of(value) or "system"})
    history = _history(value, names)
    if history and history[0]["role"] == "system":
        turns = _one_system(tuple(turns), history, "history")
    turns += history
    question = content_of(value, names.get("instruction", "instruction"), path="")
    about = dict.fromkeys((names.get("input", "input"), *(() if names else about_of(value))))
    asked = {"role": "user", "content": _with_context(question, value, about)}
    answer = {"role": "assistant", "content": content_of(value, names.get("output", "output"), path="")}
    return _conversation(row, (*turns, asked, answer), path="")


def _with_context(question: str, value: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The question and, after a blank line each, what it is about; a question that was made of its context has it already."""
    for column in columns:
        more = "" if value.get(column) in (None, "") else content_of(value, column, path="", may_be_empty=True)
        if more.strip() and more not in question:
            question = f"{question}\n\n{more}"
    return question


def _one_system(first: Turns, turns: Turns, path: str) -> Turns:
    """The system turn beside turns that begin with one: none, for it stands there; a Finding when the two differ."""
    if first and turns[0] != first[0]:
        raise Finding("data.turn-order", f"the row has a system text beside {path}[0], a system turn that says something else")
    return ()


def _history(value: Mapping[str, Any], names: Names) -> Turns:
    """The turns before the question: a list of pairs, or of turns."""
    key = names.get("history", "history")
    history = from_text(value.get(key)) or []
    if not isinstance(history, list):
        raise Finding("data.wrong-type", f"{key} is {kind(history)}, not a list")
    if all(isinstance(turn, dict) for turn in history):
        roles = {**SHAREGPT_ROLES, **MESSAGE_ROLES}
        return read_turns(history, path=key, keys=spelled(history, ("role", "content")), roles=roles)[0] if history else ()
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Finding("data.wrong-type", f"{key}[{number}] is {kind(pair)}, not a list of a question and an answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append({"role": role, "content": content_of({side: pair[side]}, side, path=f"{key}[{number}]")})
    return tuple(turns)


def has_history(value: Mapping[str, Any], names: Names) -> bool:
    """Whether the row tells what was said before its question, as pairs or turns; nothing is added to a prompt of data.columns."""
    if "prompt" in names and "history" not in names:
        return False
    history = from_text(value.get(names.get("history", "history")))
    return isinstance(history, list) and bool(history) and all(isinstance(part, list | dict) for part in history)


def parts_of(value: Mapping[str, Any], names: Names = OWN_NAMES) -> Parts | Unclear:
    """Which columns of the row are its question, answer, system text and context, data.columns first."""
    return find_parts(value, taken=names)


def _prompt_completion(row: Row, names: Names) -> Conversation:
    parts = parts_of(row.value, names)
    if isinstance(parts, Unclear):
        if parts.why:
            raise Finding("data.unclear-columns", f"{parts.why}; the setting data.columns tells")
        ask, answer = (next(iter(parts.found[part]), names.get(part, part)) for part in ("prompt", "completion"))
        parts = Parts(ask, answer, next(iter(parts.found["system"]), None))
    ours, theirs = parts.prompt, parts.completion
    prompt = required(row.value, ours, path="")
    required(row.value, theirs, path="")
    completion = answer_of(row.value, theirs)
    tools, first = _tools(row.value, names), _system(row.value, {**names, "system": parts.system or "system"})
    if theirs != "completion" and isinstance(prompt, list) != isinstance(completion, list):
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": content_of(row.value, ours, path="")}]
        completion = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = read_turns(prompt, path=ours, keys=("role", "content"), roles=MESSAGE_ROLES)
        after, silent = read_turns(completion, path=theirs, keys=("role", "content"), roles=MESSAGE_ROLES)
        if before[0]["role"] != "system":
            before = first + before
        else:
            _one_system(first, before, ours)
        context = frozenset(range(len(before))) | frozenset(number + len(before) for number in silent)
        return _conversation(row, before + after, path="", context_only=context, tools=tools)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise Finding("data.wrong-type", f"{ours} is {kind(prompt)} but {theirs} is {kind(completion)}; both must be strings or both lists")
    question = _with_context(content_of(row.value, ours, path=""), row.value, parts.context)
    history = _history(row.value, names) if has_history(row.value, names) else ()
    if history and history[0]["role"] == "system":
        first = _one_system(first, history, "history")
    turns = ({"role": "user", "content": question}, _answer({**row.value, theirs: completion}, theirs, tools=tools))
    return _conversation(row, first + history + turns, path="", tools=tools)


def _answer(value: Mapping[str, Any], key: str, *, tools: Turns) -> dict[str, Any]:
    """The assistant's turn: the text, or the calls where it is a list of calls in JSON of tools that the row defines."""
    if isinstance(value[key], int | float) and key != "completion":
        hint = f'name it in data.columns as a template, completion: "{{{key}}}", which writes it as text'
        raise Finding("data.wrong-type", f"{key} is {kind(value[key])}, not a string", hint=hint)
    text = content_of(value, key, path="")
    if plain_name(key) == "answers" and _PYTHON_ANSWERS.match(text):
        raise Finding("data.wrong-type", f"{key} is a list or an object in Python's spelling; json.dumps writes one that is read")
    calls = as_calls(text) if tools and key != "completion" else None
    return {"role": "assistant", "content": text} if calls is None else {"role": "assistant", "tool_calls": read_calls(calls, path=key)}


def _text(row: Row, names: Names) -> Conversation:
    return Conversation(row=row, text=content_of(row.value, text_column(row.value, names), path=""))


def text_column(value: Mapping[str, Any], names: Names = OWN_NAMES) -> str:
    """The key of a plain text: `text`, however it is capitalized."""
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
    """The conversation, when its turns are in order and one is learned; `offset` turns do not come from the list at `path`."""
    check_order(turns, path=path, offset=offset)
    answers = frozenset([number for number, turn in enumerate(turns) if turn["role"] == "assistant"])
    if not answers - context_only:
        roles = ", ".join(turn["role"] for turn in turns)
        message = "every assistant turn has weight 0, so nothing would be learned" if answers else f"no assistant turn, only {roles}"
        raise Finding("data.no-assistant", message, hint="add the answer that is to be learned, or remove the row")
    return Conversation(row, turns, None, context_only & answers, tools)


_READERS: dict[str, Callable[[Row, Names], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
FORMATS: Sequence[str] = tuple(_READERS)
