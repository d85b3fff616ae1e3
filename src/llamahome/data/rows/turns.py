"""Finds the list of turns of a row, in any of its spellings, and checks each turn: keys, roles, types, calls, order.

Lists under `messages` and `conversations` are always read as turns; lists under other usual names only if they look like turns.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.files.jsontext import from_json, json_or_none
from llamahome.data.rows.column_roles import ColumnRoles, find_roles, plain_name
from llamahome.data.rows.row_error import RowError, content_of, nearest, required
from llamahome.data.rows.toolcalls import read_calls

TURN_LISTS = ("messages", "conversations")
"""Keys whose value is always read as a list of turns."""
_TEXT_LISTS = ("conversations", "conversation", "dialog", "dialogue", "data")
"""Names under which a list of texts is a chat, user and assistant in turn (UltraChat)."""
_PAIR_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
"""Names under which a list of pairs of a question and an answer is a chat."""
_OTHER_LISTS = (*_PAIR_LISTS, "data", "chosen", "contents")
"""Names under which a list may be turns."""
_SPEAKER = ("role", "from", "speaker", "author", "sender")
_TEXT = ("content", "value", "text", "message", "utterance", "parts")
_MEDIA = ("audio", "images", "image", "video", "videos")
"""Keys of a turn that this version would lose, so they are refused."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text."""
_WEIGHTS = ("weight", "train")
CALLING_ROLES = ("function_call", "tool_call")
"""Roles of a sharegpt turn whose value is a tool call as JSON text."""
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", *CALLING_ROLES), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
MESSAGE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
ASKING = ("user", "human", "tool")
"""Roles of the last turn of a prompt."""


def turn_list(value: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """The key under which the row has a list of turns; `names` is data.columns."""
    for key in TURN_LISTS if names else ():
        if key in names:
            return names[key]
    usual = [key for key in TURN_LISTS if key in value]
    if (filled := next((key for key in usual if value[key]), None)) is not None:
        return filled
    likely = (key for key in value if isinstance(key, str) and key not in names.values() and plain_name(key) in _OTHER_LISTS)
    return next((key for key in likely if _looks_like_turns(key, value[key])), usual[0] if usual else None)


def _looks_like_turns(key: str, value: object) -> bool:
    turns = opened(value)
    if not isinstance(turns, list) or not turns:
        return False
    if are_texts(key, turns) or are_pairs(key, turns):
        return True
    first = turns[0]
    speaker = next((name for name in _SPEAKER if name in first), None) if isinstance(first, dict) else None
    if speaker is None:
        return False
    return plain_name(key) != "chosen" or first[speaker] != "assistant"  # then it is the answer to a prompt beside it


def opened(value: object) -> object:
    """The list of turns in JSON text, or in an object with one list for each key, as tables write them; other values as they are."""
    if isinstance(value, dict):
        return _transposed(value)
    return json_or_none(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def with_list(message: object) -> object:
    """A list with the one message, if this is a message itself; other values as they are."""
    if not isinstance(message, dict):
        return message
    speaker, text = turn_keys([message], ("", ""))
    return [message] if speaker and text and isinstance(message[speaker], str) else message


def is_prompt_in_json(value: object) -> bool:
    """Whether the text is the JSON of a list of turns that ends before an answer; a whole conversation may be a text to read."""
    turns = opened(value) if isinstance(value, str) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return False
    speaker, text = turn_keys(turns, ("role", "content"))
    return all(text in turn for turn in turns) and turns[-1].get(speaker) in ASKING


def _transposed(lists: dict[str, Any]) -> object:
    """The turns of `{"role": ["user", ...], "content": ["...", ...]}`; any other object as it is."""
    equal = all(isinstance(part, list) for part in lists.values()) and len({len(part) for part in lists.values()}) == 1
    if not equal or not any(key in lists for key in _SPEAKER) or not any(key in lists for key in _TEXT):
        return lists
    return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]


def are_texts(key: str, turns: object) -> bool:
    """Whether the list is a chat written as texts, the user's first."""
    return isinstance(turns, list) and len(turns) > 1 and plain_name(key) in _TEXT_LISTS and all(isinstance(text, str) for text in turns)


def are_pairs(key: str, turns: object) -> bool:
    """Whether the list is a chat written as pairs of a question and an answer; under `data` such pairs are rows of their own."""
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict) or plain_name(key) not in _PAIR_LISTS or any(name in first for name in _SPEAKER):
        return False
    return isinstance(find_roles(first), ColumnRoles)


def turn_keys(turns: object, usual: tuple[str, str]) -> tuple[str, str]:
    """The keys under which the turns have speaker and text; `usual` if the first turn has those or no known ones."""
    first = next((turn for turn in turns if isinstance(turn, dict)), {}) if isinstance(turns, list) else {}
    speaker, text = (next((key for key in (own, *known) if key in first), own) for own, known in zip(usual, (_SPEAKER, _TEXT), strict=True))
    return speaker, text


def as_turns(listed: Sequence[Any], *, path: str) -> list[dict[str, Any]]:
    """Texts, or pairs of a question and an answer, as turns of user and assistant; raises RowError for a pair without them."""
    if not are_pairs(path, listed):
        return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(listed)]
    turns = []
    for number, pair in enumerate(listed):
        roles = find_roles(pair) if isinstance(pair, dict) else None
        if not isinstance(roles, ColumnRoles):
            raise RowError("data.unclear-columns", f"{path}[{number}] is not a pair of a question and an answer like {path}[0]", part=pair)
        turns += [{"role": "user", "content": pair[roles.prompt]}, {"role": "assistant", "content": pair[roles.completion]}]
    return turns


def read_turns(
    value: object, *, path: str, keys: tuple[str, str], roles: Mapping[str, str]
) -> tuple[tuple[dict[str, Any], ...], frozenset[int]]:
    """The turns as a chat template takes them, and the numbers of those with weight 0; raises RowError."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = from_json(value)
        except ValueError as error:
            raise RowError("data.wrong-type", f"{path} is a string that is not a JSON list: {error}") from error
    if not isinstance(value, list):
        raise RowError("data.wrong-type", f"{path} is {kind(value)}, not a list of turns")
    if not value:
        raise RowError("data.no-turns", f"{path} is an empty list", hint="remove the row")
    turns, context_only = [], set()
    for number, turn in enumerate(value):
        if type(turn) is dict and len(turn) == 2 and (simple := _simple_turn(turn, keys, roles)) is not None:
            turns.append(simple)
            continue
        if isinstance(turn, dict) and isinstance(turn.get(keys[1]), list):
            turn = {**turn, keys[1]: joined_parts(turn[keys[1]], path=f"{path}[{number}].{keys[1]}")}
        here = f"{path}[{number}]"
        if not isinstance(turn, dict):
            raise RowError("data.wrong-type", f'{here} is {kind(turn)}, not an object with "{keys[0]}" and "{keys[1]}"')
        turns.append(_turn(turn, path=here, keys=keys, roles=roles))
        if not _is_learned(turn, path=here):
            context_only.add(number)
    return tuple(turns), frozenset(context_only)


def check_order(turns: tuple[dict[str, Any], ...], *, path: str, offset: int = 0) -> None:
    """RowError for an order that is surely wrong: a later system turn, two answers in a row, a tool result after no assistant turn."""
    role = None
    for number, turn in enumerate(turns):
        before, role = role, turn["role"]
        if role == "user" or (role == "assistant" and before != "assistant") or (role == "system" and not number):
            continue
        here, hint = f"{path}[{number - offset}]" if path else f"turn {number}", None
        if role == "system":
            message = f"{here} is a system turn after turn {number - 1}; only the first may be one"
        elif role == "assistant":
            message, hint = f"{here} is an assistant turn right after another", "join the two into one turn"
        elif before not in ("assistant", "tool"):
            message = f"{here} is a tool result that follows no assistant turn"
        else:
            continue
        raise RowError("data.turn-order", message, part=turn, hint=hint)


def _simple_turn(turn: dict[str, Any], keys: tuple[str, str], roles: Mapping[str, str]) -> dict[str, Any] | None:
    """A turn of a known role and a text alone, as nearly all are; the same as `_turn`, five times as fast."""
    role, content = turn.get(keys[0]), turn.get(keys[1])
    if type(role) is not str or role in CALLING_ROLES or role not in roles or type(content) is not str or not content or content.isspace():
        return None
    return {"role": roles[role], "content": content}


def joined_parts(parts: list[Any], *, path: str) -> str:
    """The text of a content in parts, `[{"type": "text", "text": "..."}]`, joined as chat templates join them."""
    texts = []
    for number, part in enumerate(parts):
        here = f"{path}[{number}]"
        if not isinstance(part, dict):
            message = f'{here} is {kind(part)}, not a part like {{"type": "text", "text": "..."}}'
            raise RowError("data.wrong-type", message, part=part, hint="write the text itself as a string")
        type_ = part.get("type", "text")
        if type_ not in _TEXT_PARTS:
            message = f"{here} is a part of the type {type_ if isinstance(type_, str) else json.dumps(type_)}; only texts are learned from"
            raise RowError("data.not-rendered", message, hint="remove the row, or the part", part=part)
        text = required(part, "text", path=here)
        if not isinstance(text, str):
            raise RowError("data.wrong-type", f"{here}.text is {kind(text)}, not a string", part=part, hint="write the text as a string")
        texts.append(text)
    return "".join(texts)


def _turn(turn: dict[str, Any], *, path: str, keys: tuple[str, str], roles: Mapping[str, str]) -> dict[str, Any]:
    """One turn: role and content, the calls and reasoning of an assistant, the name of a tool and the call that it answers."""
    role = _role(turn, key=keys[0], path=path, roles=roles)
    for key in _MEDIA:
        if turn.get(key):
            raise RowError("data.not-rendered", f"{path}.{key} is there; only texts are learned from", part=turn, hint=f'remove "{key}"')
    if turn[keys[0]] in CALLING_ROLES:
        return {"role": role, "tool_calls": read_calls(required(turn, keys[1], path=path), path=f"{path}.{keys[1]}")}
    called = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
    if called is not None and role != "assistant":
        raise RowError("data.bad-tool-call", f"{path} is a {role} turn with {called}; only the assistant calls tools", part=turn)
    read: dict[str, Any] = {"role": role}
    if called is None or turn.get(keys[1]) not in (None, ""):
        read["content"] = content_of(turn, keys[1], path=path, may_be_empty=role in ("system", "tool") or called is not None)
    if called is not None:
        read["tool_calls"] = read_calls(turn[called], path=f"{path}.{called}")
    for key in _REASONING:
        if turn.get(key):
            reasoning = content_of(turn, key, path=path)
            if role != "assistant":
                raise RowError("data.not-rendered", f"{path}.{key} is in a {role} turn", part=turn, hint=f'remove "{key}"')
            read |= {"reasoning_content": reasoning, "thinking": reasoning}
    if role == "tool":
        read |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return read


def _role(turn: dict[str, Any], *, key: str, path: str, roles: Mapping[str, str]) -> str:
    role = required(turn, key, path=path)
    if not isinstance(role, str):
        raise RowError("data.wrong-type", f"{path}.{key} is {kind(role)}, not a string", part=turn)
    if role in roles:
        return roles[role]
    if key not in ("role", "from") and role.lower() in roles and role.lower() not in CALLING_ROLES:
        return roles[role.lower()]
    near = nearest(role, roles)
    hint = f'write "{near}" instead of "{role}"' if near else None
    raise RowError("data.unknown-role", f'{path}.{key} is "{role}", not one of {", ".join(roles)}', part=turn, hint=hint)


def _is_learned(turn: dict[str, Any], *, path: str) -> bool:
    for key in _WEIGHTS:
        weight = turn.get(key)
        if weight is not None and weight not in (0, 1):
            raise RowError("data.wrong-type", f"{path}.{key} is {json.dumps(weight)}; a turn is learned (1) or not (0)", part=turn)
        if weight is not None and not weight:
            return False
    return True
