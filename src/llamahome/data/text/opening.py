"""What a model folder says of its tokenizer and ends, and what can be wrong with it, told as errors of the settings."""

import difflib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from llamahome.data.rows.fault import Finding
from llamahome.errors import ConfigError, Problem


def read_template(path: str) -> str:
    """The text of a chat template; ConfigError when the file cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        hint = "--set model.chat_template=FILE.jinja with a file that exists"
        message = f"cannot read the chat template: {reason}"
        raise ConfigError(Problem(code="model.bad-chat-template", message=message, where=path, hint=hint)) from error


def check_template(render: Callable[[list[dict[str, Any]]], str], where: str) -> None:
    """ConfigError when the template cannot be compiled; what it refuses of single chats is a matter of those rows."""
    try:
        render([{"role": "user", "content": "a"}])
    except Finding as finding:
        error = finding.__cause__
        if isinstance(error, jinja2.TemplateSyntaxError):
            message = f"the chat template is not valid Jinja: {error.message}"
            problem = Problem(code="model.bad-chat-template", message=message, where=f"{where}:{error.lineno}", hint="mend that line")
            raise ConfigError(problem) from error


def set_eos(tokenizer: Any, token: str) -> None:
    """Make a token of its vocabulary the end of a text, as if tokenizer_config.json said so; ConfigError when there is none."""
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        near = difflib.get_close_matches(token, vocabulary, n=1)
        hint = f"--set {shlex.quote(f'model.eos_token={near[0]}')}" if near else None
        message = f"the vocabulary of the model has no token {token!r}"
        raise ConfigError(Problem(code="model.unknown-token", message=message, where="model.eos_token", hint=hint))
    tokenizer.add_special_tokens({"eos_token": token})


def read_stops(folder: Path) -> tuple[int, ...]:
    """Ids at which the model of a folder stops by itself: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            content: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found = content.get("eos_token_id") if isinstance(content, dict) else None
        return tuple(number for number in (found if isinstance(found, list) else [found]) if isinstance(number, int))
    return ()
