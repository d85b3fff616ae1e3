"""Rows to conversations: which of five formats the rows are in, and one function per format that understands a row of it.

    messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}
    prompt_completion  {"prompt": "...", "completion": "..."}, or both as lists of messages
    text               {"text": "..."}

What a row lacks is said with its JSON path and the nearest name. Nothing is guessed that could teach the wrong thing. `names` (the setting
data.columns) says under which key of theirs a key of ours is found.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.files.jsontext import Unusual, not_finite_at
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.fault import Finding, content_of, problem_at, required
from llamahome.data.rows.toolcalls import read_definitions
from llamahome.data.rows.turns import CALLING_ROLE, check_order, read_turns
from llamahome.errors import Problem

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    CALLING_ROLE: "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
MESSAGE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
TURN_LISTS = ("messages", "conversations")
"""Keys under which a list of turns is found, whichever way its turns are written."""
KEYS: Mapping[str, tuple[str, ...]] = {
    "messages": (*TURN_LISTS, "system", "tools"),
    "sharegpt": (*TURN_LISTS, "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "text": ("text",),
}
"""What each format reads of a row."""
OWN_NAMES: Mapping[str, str] = MappingProxyType({})

Names = Mapping[str, str]
Turns = tuple[dict[str, Any], ...]


def understand(row: Row, format_name: str, names: Names = OWN_NAMES) -> Conversation | Problem:
    """The conversation that the row holds, or what is wrong with it; never raises on data."""
    try:
        found = _READERS[format_name](row, names)
        if isinstance(row.value, Unusual):
            _refuse_not_finite(found)
        return found
    except Finding as finding:
        return problem_at(row, finding)


def _refuse_not_finite(found: Conversation) -> None:
    """A Finding when NaN or an infinity is among what was read of the row."""
    for name, part in (("the turns", found.turns), ("the tools", found.tools)):
        path = not_finite_at(part)
        if path is not None:
            raise Finding("data.bad-json", f"NaN or an infinity stands in {name}, at {path}; neither is a JSON value")


def turn_list(value: Mapping[str, Any], names: Names = OWN_NAMES) -> str | None:
    """The key under which the row has a list of turns."""
    for ours in TURN_LISTS if names else ():
        if ours in names:
            return names[ours]
    for key in TURN_LISTS:
        if key in value:
            return key
    return None


def _messages(row: Row, names: Names) -> Conversation:
    return _listed(row, names, keys=("role", "content"), roles=MESSAGE_ROLES)


def _sharegpt(row: Row, names: Names) -> Conversation:
    return _listed(row, names, keys=("from", "value"), roles=SHAREGPT_ROLES)


def _listed(row: Row, names: Names, *, keys: tuple[str, str], roles: dict[str, str]) -> Conversation:
    path = turn_list(row.value, names) or (TURN_LISTS[0] if keys[0] == "role" else TURN_LISTS[1])
    turns, silent = read_turns(required(row.value, path, path=""), path=path, keys=keys, roles=roles)
    first = _system(row.value, names)
    if first and turns[0]["role"] == "system":
        if turns[0] != first[0]:
            raise Finding("data.turn-order", f"the row has a system text beside {path}[0], a system turn that says something else")
        first = ()
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
    turns = list(_system(value, names))
    for number, pair in enumerate(_history(value, names)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Finding("data.wrong-type", f"history[{number}] is {kind(pair)}, not a list of a question and an answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append({"role": role, "content": content_of({side: pair[side]}, side, path=f"history[{number}]")})
    question = content_of(value, names.get("instruction", "instruction"), path="")
    more = names.get("input", "input")
    if value.get(more) not in (None, ""):
        question = f"{question}\n\n{content_of(value, more, path='')}"
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": content_of(value, names.get("output", "output"), path="")})
    return _conversation(row, tuple(turns), path="")


def _history(value: dict[str, Any], names: Names) -> list[Any]:
    history = value.get(names.get("history", "history")) or []
    if not isinstance(history, list):
        raise Finding("data.wrong-type", f"history is {kind(history)}, not a list")
    return history


def _prompt_completion(row: Row, names: Names) -> Conversation:
    ours, theirs = names.get("prompt", "prompt"), names.get("completion", "completion")
    prompt, completion = required(row.value, ours, path=""), required(row.value, theirs, path="")
    tools, first = _tools(row.value, names), _system(row.value, names)
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = read_turns(prompt, path=ours, keys=("role", "content"), roles=MESSAGE_ROLES)
        after, silent = read_turns(completion, path=theirs, keys=("role", "content"), roles=MESSAGE_ROLES)
        if before[0]["role"] != "system":
            before = first + before
        elif first and before[0] != first[0]:
            raise Finding("data.turn-order", f"the row has a system text beside {ours}[0], a system turn that says something else")
        context = frozenset(range(len(before))) | frozenset(number + len(before) for number in silent)
        return _conversation(row, before + after, path="", context_only=context, tools=tools)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise Finding("data.wrong-type", f"{ours} is {kind(prompt)} but {theirs} is {kind(completion)}; both must be strings or both lists")
    turns = (
        {"role": "user", "content": content_of(row.value, ours, path="")},
        {"role": "assistant", "content": content_of(row.value, theirs, path="")},
    )
    return _conversation(row, first + turns, path="", tools=tools)


def _text(row: Row, names: Names) -> Conversation:
    return Conversation(row=row, text=content_of(row.value, names.get("text", "text"), path=""))


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
