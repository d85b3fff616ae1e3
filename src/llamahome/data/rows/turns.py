"""The turns of a chat as a row writes them, checked one by one: keys, roles, types, contents, calls, order."""

import json
from collections.abc import Mapping
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.files.jsontext import from_json
from llamahome.data.rows.fault import Finding as Finding
from llamahome.data.rows.fault import content_of, required
from llamahome.data.rows.fault import nearest as nearest
from llamahome.data.rows.fault import problem_at as problem_at
from llamahome.data.rows.toolcalls import read_calls

_UNREAD = ("audio", "images", "image", "video", "videos")
"""Keys of a turn that carry what this version would lose; refused rather than dropped."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which the thoughts before an answer are found."""
_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a part of a content that is text."""
_WEIGHTS = ("weight", "train")


CALLING_ROLES = ("function_call", "tool_call")
"""Roles of a sharegpt turn whose value is a tool call as JSON text."""


def read_turns(
    value: object, *, path: str, keys: tuple[str, str], roles: Mapping[str, str]
) -> tuple[tuple[dict[str, Any], ...], frozenset[int]]:
    """The turns as a chat template takes them, and the numbers of those with weight 0; raises Finding."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, path=path)
    if not isinstance(value, list):
        raise Finding("data.wrong-type", f"{path} is {kind(value)}, not a list of turns")
    if not value:
        raise Finding("data.no-turns", f"{path} is an empty list", hint="remove the row")
    turns, silent = [], set()
    for number, turn in enumerate(value):
        if isinstance(turn, dict) and isinstance(turn.get(keys[1]), list):
            turn = {**turn, keys[1]: _joined(turn[keys[1]], path=f"{path}[{number}].{keys[1]}")}
        if type(turn) is dict and len(turn) == 2 and (plain := _plain(turn, keys, roles)) is not None:
            turns.append(plain)
            continue
        here = f"{path}[{number}]"
        if not isinstance(turn, dict):
            raise Finding("data.wrong-type", f'{here} is {kind(turn)}, not an object with "{keys[0]}" and "{keys[1]}"')
        turns.append(_turn(turn, path=here, keys=keys, roles=roles))
        if not _weight(turn, path=here):
            silent.add(number)
    return tuple(turns), frozenset(silent)


def _plain(turn: dict[str, Any], keys: tuple[str, str], roles: Mapping[str, str]) -> dict[str, Any] | None:
    """The turn when it is a known role and a text and nothing else, as nearly all are: the same as `_turn`, five times as fast."""
    role, content = turn.get(keys[0]), turn.get(keys[1])
    if type(role) is not str or role in CALLING_ROLES or role not in roles or type(content) is not str or not content or content.isspace():
        return None
    return {"role": roles[role], "content": content}


def _joined(parts: list[Any], *, path: str) -> str:
    """The text of a content in parts, `[{"type": "text", "text": "..."}]`, one after the other as chat templates write them."""
    texts = []
    for number, part in enumerate(parts):
        here = f"{path}[{number}]"
        if not isinstance(part, dict):
            message = f'{here} is {kind(part)}, not a part like {{"type": "text", "text": "..."}}'
            raise Finding("data.wrong-type", message, part=part, hint="write the text itself as a string")
        type_ = part.get("type", "text")
        if type_ not in _TEXT_PARTS:
            message = f"{here} is a part of the type {type_ if isinstance(type_, str) else json.dumps(type_)}; texts alone are learned from"
            raise Finding("data.not-rendered", message, hint="remove the row, or the part", part=part)
        text = required(part, "text", path=here)
        if not isinstance(text, str):
            raise Finding("data.wrong-type", f"{here}.text is {kind(text)}, not a string", part=part, hint="write the text as a string")
        texts.append(text)
    return "".join(texts)


def _turn(turn: dict[str, Any], *, path: str, keys: tuple[str, str], roles: Mapping[str, str]) -> dict[str, Any]:
    """One turn: role and content, and of an assistant its calls and thoughts, of a tool its name and the call that it answers."""
    role = _role(turn, key=keys[0], path=path, roles=roles)
    if len(turn) == 2 and keys[1] in turn and turn[keys[0]] not in CALLING_ROLES:
        return {"role": role, "content": content_of(turn, keys[1], path=path, may_be_empty=role in ("system", "tool"))}
    for key in _UNREAD:
        if turn.get(key):
            raise Finding("data.not-rendered", f"{path}.{key} is there; texts alone are learned from", part=turn, hint=f'remove "{key}"')
    if turn[keys[0]] in CALLING_ROLES:
        return {"role": role, "tool_calls": read_calls(required(turn, keys[1], path=path), path=f"{path}.{keys[1]}")}
    called = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
    if called is not None and role != "assistant":
        raise Finding("data.bad-tool-call", f"{path} is a {role} turn with {called}; only the assistant calls tools", part=turn)
    read: dict[str, Any] = {"role": role}
    if called is None or turn.get(keys[1]) not in (None, ""):
        read["content"] = content_of(turn, keys[1], path=path, may_be_empty=role in ("system", "tool") or called is not None)
    if called is not None:
        read["tool_calls"] = read_calls(turn[called], path=f"{path}.{called}")
    for key in _REASONING:
        if turn.get(key):
            thoughts = content_of(turn, key, path=path)
            if role != "assistant":
                raise Finding("data.not-rendered", f"{path}.{key} is in a {role} turn", part=turn, hint=f'remove "{key}"')
            read |= {"reasoning_content": thoughts, "thinking": thoughts}
    if role == "tool":
        read |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return read


def _from_json(text: str, *, path: str) -> Any:
    """What a list in JSON text holds; tables cannot hold lists."""
    try:
        return from_json(text)
    except ValueError as error:
        raise Finding("data.wrong-type", f"{path} is a string that is no JSON list: {error}") from error


def check_order(turns: tuple[dict[str, Any], ...], *, path: str, offset: int = 0) -> None:
    """Finding for an order that is surely wrong: a later system turn, two answers in a row, a tool result that nobody asked for."""
    for number, turn in enumerate(turns):
        role, before = turn["role"], turns[number - 1]["role"] if number else None
        if role == "user" or (role == "assistant" and before != "assistant") or (role == "system" and not number):
            continue
        here = f"{path}[{number - offset}]" if path else f"turn {number}"
        if role == "system":
            raise Finding("data.turn-order", f"{here} is a system turn after turn {number - 1}; only the first may be one", part=turn)
        if role == "assistant":
            raise Finding(
                "data.turn-order", f"{here} is an assistant turn right after another", part=turn, hint="join the two into one turn"
            )
        if role == "tool" and before not in ("assistant", "tool"):
            raise Finding("data.turn-order", f"{here} is a tool result that follows no assistant turn", part=turn)


def _role(turn: dict[str, Any], *, key: str, path: str, roles: Mapping[str, str]) -> str:
    role = required(turn, key, path=path)
    if not isinstance(role, str):
        raise Finding("data.wrong-type", f"{path}.{key} is {kind(role)}, not a string", part=turn)
    if role in roles:
        return roles[role]
    if key not in ("role", "from") and role.lower() in roles and role.lower() not in CALLING_ROLES:
        return roles[role.lower()]
    near = nearest(role, roles)
    hint = f'write "{near}" instead of "{role}"' if near else None
    raise Finding("data.unknown-role", f'{path}.{key} is "{role}", not one of {", ".join(roles)}', part=turn, hint=hint)


def _weight(turn: dict[str, Any], *, path: str) -> bool:
    for key in _WEIGHTS:
        weight = turn.get(key)
        if weight is not None and weight not in (0, 1):
            raise Finding("data.wrong-type", f"{path}.{key} is {json.dumps(weight)}; a turn is learned (1) or not (0)", part=turn)
        if weight is not None and not weight:
            return False
    return True
