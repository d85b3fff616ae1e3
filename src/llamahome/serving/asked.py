"""Reads the body of a request to the OpenAI API: what is asked, or a refusal that names the field and the reason.

Nothing is ignored: a field that this server cannot obey is refused, unless its value asks for nothing.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamahome.data.files.jsontext import from_json
from llamahome.errors import ConfigError
from llamahome.model.sampling import Sampling

_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
}
"""Fields that this server does not offer, and the values with which they ask for nothing."""
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that change no answer: names for the request, and how tools are called where there are none."""
_OBEYED = (
    "model",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
)
_ROLES = ("system", "developer", "user", "assistant")
_MOST_STOPS = 16
_MOST_NEW = 2**31
_SHOWN = 60


class Refused(Exception):
    """A request that is not answered, as the API says it."""

    def __init__(self, message: str, *, param: str | None = None, api_code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.api_code, self.status = message, param, api_code, status

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.api_code}}


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    turns: list[dict[str, str]]
    """The conversation; empty for plain text."""
    text: str
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool

    def turns_after(self, system: str | None) -> list[dict[str, str]]:
        """The conversation, begun with the message `system` unless it has a system message of its own."""
        if not system or any(turn["role"] == "system" for turn in self.turns):
            return self.turns
        return [{"role": "system", "content": system}, *self.turns]


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; raises Refused."""
    try:
        value = from_json(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(f"the body is not UTF-8: byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise Refused(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except ValueError as error:
        raise Refused(f"the body is not JSON that can be used: {error}") from error
    if not isinstance(value, dict):
        raise Refused("the body is not a JSON object")
    return value


def read_chat(body: Mapping[str, Any], names: tuple[str, ...], default: Sampling) -> Asked:
    """What a body of /v1/chat/completions asks; raises Refused. `names` are those of the served model."""
    _check_fields(body, ("messages", "max_completion_tokens", *_OBEYED))
    _check_model(body, names)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message", param="messages")
    turns = [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]
    return _asked(body, default, turns=turns)


def read_completion(body: Mapping[str, Any], names: tuple[str, ...], default: Sampling) -> Asked:
    """What a body of /v1/completions asks; raises Refused."""
    _check_fields(body, ("prompt", *_OBEYED))
    _check_model(body, names)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused("prompt must be one text", param="prompt")
    return _asked(body, default, text=prompt)


def _asked(body: Mapping[str, Any], default: Sampling, *, turns: list[dict[str, str]] | None = None, text: str = "") -> Asked:
    stream = _flag(body, "stream")
    stream_options = body.get("stream_options")
    if stream_options is not None and not stream:
        raise Refused("stream_options need stream: true", param="stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise Refused("stream_options must be an object", param="stream_options")
    if unknown := [
        name for name, value in (stream_options or {}).items() if name not in ("include_usage", "include_obfuscation") and value
    ]:
        raise Refused(f"stream_options.{unknown[0]} is not offered here", param="stream_options")
    include_usage = _flag(stream_options or {}, "include_usage", within="stream_options.")
    return Asked(turns or [], text, _sampling(body, default), _stops(body), stream, include_usage)


def _check_fields(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name, value in body.items():
        if name in known or name in _LABELS or value is None:
            continue
        if name in _NOTHING:
            if not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in _NOTHING[name]):
                raise Refused(f"{name} is not offered by this server: leave it out", param=name, api_code="unsupported_parameter")
            continue
        near = difflib.get_close_matches(name, (*known, *_NOTHING), n=1)
        raise Refused(
            f"unknown field {_short(name)}{f', {near[0]} is the nearest' if near else ''}",
            param=name[:_SHOWN],
            api_code="unknown_parameter",
        )


def _check_model(body: Mapping[str, Any], names: tuple[str, ...]) -> None:
    name = body.get("model")
    if name is not None and not isinstance(name, str):
        raise Refused("model must be a text", param="model")
    if name is not None and name not in names:
        raise Refused(
            f"there is no model {_short(name)}; this server has {names[0]}", param="model", api_code="model_not_found", status=404
        )


def _turn(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refused(f"{where} must be an object", param=where)
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise Refused(f"{where}: this server does not offer tools", param=where, api_code="unsupported_value")
    if not isinstance(role, str) or role not in _ROLES:
        raise Refused(f"{where}.role must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    if unknown := [name for name, value in message.items() if name not in ("role", "content") and value]:
        raise Refused(f"{where}.{unknown[0][:_SHOWN]} is not offered by this server", param=where, api_code="unsupported_parameter")
    return {"role": "system" if role == "developer" else role, "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Refused(f"{where} must be a text or a list of text parts", param=where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"a part of type {_short(kind)}" if isinstance(kind, str) and kind != "text" else "no text part"
            raise Refused(f"{where}[{number}] is {what}: this model reads text", param=f"{where}[{number}]", api_code="unsupported_value")
        texts.append(part["text"])
    return "".join(texts)


def _sampling(body: Mapping[str, Any], default: Sampling) -> Sampling:
    values = {name: getattr(default, name) for name in Sampling.__dataclass_fields__}
    given = {name: body[name] for name in values if body.get(name) is not None}
    if given.get("top_k") == -1:  # vLLM's word for all tokens
        given["top_k"] = 0
    temperature = given.get("temperature")
    if isinstance(temperature, int | float) and temperature > 2:
        raise Refused("temperature must be a number from 0 to 2", param="temperature")
    most = {name: body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None}
    for name, value in most.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise Refused(f"{name} must be a whole number of at least 1", param=name)
        given["max_new_tokens"] = min(value, _MOST_NEW)
    if len(set(most.values())) > 1:
        raise Refused("max_tokens and max_completion_tokens differ", param="max_tokens")
    try:
        return Sampling(**{**values, **given})
    except ConfigError as error:
        problem = error.problems[0]
        raise Refused(f"{problem.where}: {problem.message}", param=problem.where) from error


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if stop is not None else []
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(each, str) and each for each in stops):
        raise Refused(f"stop must be a text, or a list of at most {_MOST_STOPS} texts that are not empty", param="stop")
    return tuple(stops)


def _flag(body: Mapping[str, Any], name: str, *, within: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{within}{name} must be true or false", param=within + name)
    return bool(value)


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
