"""Rows to conversations: which of five formats the rows are in, and one function per format that understands a row of it.

    messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}
    prompt_completion  {"prompt": "...", "completion": "..."}, or both as lists of messages
    text               {"text": "..."}

What a row lacks is said with its JSON path and the nearest name. Nothing is guessed that could teach the wrong thing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llamahome.data.jsonrow import kind
from llamahome.data.records import Conversation, Row
from llamahome.data.turns import Finding, check_order, content_of, problem_at, read_turns, required
from llamahome.errors import Problem

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
}
MESSAGE_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
TURN_LISTS = ("messages", "conversations")
"""Keys under which a list of turns is found, whichever way its turns are written."""

Turns = tuple[dict[str, Any], ...]


def understand(row: Row, format_name: str) -> Conversation | Problem:
    """The conversation that the row holds, or what is wrong with it; never raises on data."""
    try:
        return _READERS[format_name](row)
    except Finding as finding:
        return problem_at(row, finding)


def _messages(row: Row) -> Conversation:
    return _listed(row, keys=("role", "content"), roles=MESSAGE_ROLES)


def _sharegpt(row: Row) -> Conversation:
    return _listed(row, keys=("from", "value"), roles=SHAREGPT_ROLES)


def _listed(row: Row, *, keys: tuple[str, str], roles: dict[str, str]) -> Conversation:
    name = next((key for key in TURN_LISTS if key in row.value), None)
    if name is None:
        name = TURN_LISTS[0] if keys[0] == "role" else TURN_LISTS[1]
        required(row.value, name, path="")
    _refuse_tools(row.value)
    turns, silent = read_turns(row.value[name], path=str(name), keys=keys, roles=roles)
    return _conversation(row, turns, path=str(name), context_only=silent)


def _alpaca(row: Row) -> Conversation:
    value = row.value
    turns: list[dict[str, Any]] = []
    if value.get("system") not in (None, ""):
        turns.append({"role": "system", "content": content_of(value, "system", path="")})
    for number, pair in enumerate(_history(value)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Finding("data.wrong-type", f"history[{number}] is {kind(pair)}, not a list of a question and an answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append({"role": role, "content": content_of({side: pair[side]}, side, path=f"history[{number}]")})
    question = content_of(value, "instruction", path="")
    if value.get("input") not in (None, ""):
        question = f"{question}\n\n{content_of(value, 'input', path='')}"
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": content_of(value, "output", path="")})
    return _conversation(row, tuple(turns), path="")


def _history(value: dict[str, Any]) -> list[Any]:
    history = value.get("history") or []
    if not isinstance(history, list):
        raise Finding("data.wrong-type", f"history is {kind(history)}, not a list")
    return history


def _prompt_completion(row: Row) -> Conversation:
    prompt, completion = required(row.value, "prompt", path=""), required(row.value, "completion", path="")
    _refuse_tools(row.value)
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = read_turns(prompt, path="prompt", keys=("role", "content"), roles=MESSAGE_ROLES)
        after, silent = read_turns(completion, path="completion", keys=("role", "content"), roles=MESSAGE_ROLES)
        context = frozenset(range(len(before))) | frozenset(number + len(before) for number in silent)
        return _conversation(row, before + after, path="", context_only=context)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise Finding(
            "data.wrong-type", f"prompt is {kind(prompt)} but completion is {kind(completion)}; both must be strings or both lists"
        )
    turns = (
        {"role": "user", "content": content_of(row.value, "prompt", path="")},
        {"role": "assistant", "content": content_of(row.value, "completion", path="")},
    )
    return _conversation(row, turns, path="")


def _text(row: Row) -> Conversation:
    return Conversation(row=row, text=content_of(row.value, "text", path=""))


def _refuse_tools(value: dict[str, Any]) -> None:
    for key in ("tools", "functions"):
        if value.get(key):
            raise Finding(
                "data.tool-calls", f"`{key}` is there, but tool definitions are not rendered by this version", hint=f"remove `{key}`"
            )


def _conversation(row: Row, turns: Turns, *, path: str, context_only: frozenset[int] = frozenset()) -> Conversation:
    check_order(turns, path=path)
    learned = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number not in context_only]
    if not learned:
        roles = ", ".join(turn["role"] for turn in turns)
        has_some = any(turn["role"] == "assistant" for turn in turns)
        message = "every assistant turn has weight 0, so nothing would be learned" if has_some else f"no assistant turn, only {roles}"
        raise Finding("data.no-assistant", message, hint="add the answer that is to be learned, or remove the row")
    return Conversation(row=row, turns=turns, context_only=context_only & {n for n, t in enumerate(turns) if t["role"] == "assistant"})


_READERS: dict[str, Callable[[Row], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
FORMATS: Sequence[str] = tuple(_READERS)
