"""Tool calls and tool definitions of a row, brought into the one form that chat templates read; and whether a rendered text shows them.

    {"type": "function", "id": "...", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}

Arguments may be an object or JSON text, a call may be the bare function, and a list may be JSON text, because tables cannot hold objects.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.files.jsontext import from_json
from llamahome.data.rows.row_error import RowError

_DEEPEST = 100
_EXAMPLE = '{"name": "clock", "arguments": {"zone": "UTC"}}'
_DEFINITION = '{"name": "clock", "parameters": {"type": "object"}}'


def read_calls(value: object, *, path: str) -> list[dict[str, Any]]:
    """The tool calls at `path`; raises RowError."""
    calls = _opened(value, path=path)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise _bad(path, f"is {kind(calls)}, not a list of calls", part=value)
    return [_call(call, path=f"{path}[{number}]") for number, call in enumerate(calls)]


def as_calls(text: str) -> list[Any] | None:
    """The calls in a text that is a JSON list of objects with a name and arguments; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        calls = from_json(text)
    except ValueError:
        return None
    return calls if calls and all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls) else None


def read_definitions(value: object, *, path: str) -> tuple[dict[str, Any], ...]:
    """The tool definitions at `path`, each as {"type": "function", "function": {"name": ...}}; raises RowError."""
    listed = _opened(value, path=path)
    if not isinstance(listed, list):
        raise _bad(path, f"is {kind(listed)}, not a list of tool definitions", part=value, example=_DEFINITION)
    tools = []
    for number, written in enumerate(listed):
        here = f"{path}[{number}]"
        tool = _opened(written, path=here)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise _bad(here, 'is not a tool definition: it has no "name"', part=tool, example=_DEFINITION)
        tools.append({**tool, "type": "function"} if "function" in tool else {"type": "function", "function": tool})
    return tuple(without_nulls(tool) for tool in tools)


def shown_calls(calls: Sequence[Mapping[str, Any]], text: str) -> str | None:
    """The first part of a call that the text does not contain, in words; None if all are there."""
    for call in calls:
        function = call["function"]
        if function["name"] not in text:
            return f"the name of the tool {function['name']}"
        for part in _leaves(function["arguments"]):
            if not any(spelling in text for spelling in _spellings(part)):
                return f"the argument {part!r} of the tool {function['name']}"
    return None


def shown_definitions(tools: Sequence[Mapping[str, Any]], text: str) -> str | None:
    """The name of the first tool that the text does not contain."""
    return next((tool["function"]["name"] for tool in tools if tool["function"]["name"] not in text), None)


def with_text_arguments(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The turns with the arguments of their calls as JSON text, for templates that write arguments as they are."""
    return [
        {**turn, "tool_calls": [{**c, "function": {**c["function"], "arguments": _dumped(c["function"]["arguments"])}} for c in calls]}
        if (calls := turn.get("tool_calls"))
        else dict(turn)
        for turn in turns
    ]


def with_contents(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The turns with an empty content if they have none, for templates that read the content of every turn."""
    return [{"content": "", **turn} for turn in turns]


def texts_of(value: object) -> Iterator[str]:
    """Every string in a JSON value, including keys."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, str))


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, because a table writes one for every key that any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _call(written: object, *, path: str) -> dict[str, Any]:
    call = _opened(written, path=path)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise _bad(path, f"is {kind(call)}, not a call", part=call)
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise _bad(path, 'has no "name" of a tool', part=call)
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments in (None, "") else _opened(arguments, path=f"{path}.arguments")
    if not isinstance(arguments, dict):
        raise _bad(f"{path}.arguments", f"is {kind(arguments)}, not an object", part=call)
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **call_id, "function": {"name": name, "arguments": arguments}}


def _opened(value: object, *, path: str) -> Any:
    """The value itself, or the value of its JSON text; RowError if it is not JSON or too deep."""
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as error:
            raise _bad(path, f"is not valid JSON: {error}", part=value) from error
    level = [value]
    for _ in range(_DEEPEST):
        parts = [list(part.values()) if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [inner for part in parts for inner in part]
        if not level:
            return value
    raise _bad(path, f"is nested more than {_DEEPEST} deep", part=None)


def _bad(path: str, what: str, *, part: object, example: str = _EXAMPLE) -> RowError:
    return RowError("data.bad-tool-call", f"{path} {what}", hint=f"write it like {example}", part=part)


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _spellings(leaf: object) -> tuple[str, ...]:
    """How a template may write it: as it is, as JSON, as JSON with escapes (once or, within JSON text, twice)."""
    text = leaf if isinstance(leaf, str) else str(leaf)
    plain, escaped = _dumped(leaf), json.dumps(leaf)
    inner = plain[1:-1] if isinstance(leaf, str) else plain
    return text, plain, escaped, inner, escaped[1:-1] or escaped, json.dumps(inner, ensure_ascii=False)[1:-1]


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
