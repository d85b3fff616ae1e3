"""What a model folder and the settings say about the tokenizer, and why a folder has no fast tokenizer. The tokenizer itself is not loaded.

The messages about packages were tried with transformers 5.23: with sentencepiece (and protobuf) it makes a fast tokenizer from a
SentencePiece file, with tiktoken from a list of tokens. A tokenizer class that is written in Python stays slow whatever is installed.
"""

import difflib
import json
import re
import shlex
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2

from llamahome.config.schema import ModelConfig
from llamahome.data.rows.row_error import RowError
from llamahome.data.text.new_tokens import read_new_tokens
from llamahome.errors import ConfigError, Problem
from llamahome.lfs import is_pointer, pull_command

_SENTENCEPIECE_START = re.compile(rb"\n[\x04-\x7f]\n[\x01-\x7f]")
"""The beginning of SentencePiece's protocol buffer: the first piece, which contains its text."""
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""A line of a tiktoken file: the bytes of a token in base64, and its id."""
_DEFAULT_NAME = "tokenizer.model"
"""The only name under which transformers finds a SentencePiece file without a tokenizer class."""
SystemRole = Literal["auto", "turn", "merge"]


class TokenizerSource(NamedTuple):
    """The arguments of `open_tokenizer` in data/text/tokens.py; may be sent to another process."""

    folder: str
    chat_template: str | None = None
    """model.chat_template."""
    eos_token: str | None = None
    """model.eos_token."""
    system_role: SystemRole = "auto"
    """model.system_role."""
    new_tokens: tuple[str, ...] = ()
    """The tokens of model.new_tokens."""


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """The folder whose tokenizer a run takes: the adapter's, if it brings one, or the base's."""
    brings = adapter is not None and any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return adapter if adapter is not None and brings else base


def tokenizer_source(folder: Path | str, model: ModelConfig, *, trains: bool = False) -> TokenizerSource:
    """The tokenizer of a model folder, with the settings for it; with model.new_tokens if the base in `folder` `trains` them.

    A trained model has its new tokens in its own files.
    """
    new = read_new_tokens(model.new_tokens) if trains else ()
    return TokenizerSource(str(folder), model.chat_template, model.eos_token, model.system_role, new)


def read_template(path: str) -> str:
    """The text of a chat template file; raises ConfigError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        near = difflib.get_close_matches(Path(path).name, [file.name for file in Path(path).parent.glob("*.jinja")], n=1)
        hint = f"--set {shlex.quote(f'model.chat_template={Path(path).parent / near[0]}')}" if near else None
        message = f"cannot read the chat template: {reason}"
        raise ConfigError(Problem(code="model.bad-chat-template", message=message, where=path, hint=hint)) from error


def no_chat_template(what: str, names: Sequence[str]) -> Problem:
    """The problem of a model without a chat template, or without a default one among those of these `names`."""
    message = f"{what}, but the model's tokenizer has no chat template"
    hint = "--set model.chat_template=FILE.jinja, or --model with a model that was tuned for chat"
    if names:
        message = f"{what}, but none of the chat templates of the model's tokenizer ({', '.join(names)}) is the default"
        hint = "--set model.chat_template=FILE.jinja   with the text of one of them in the file"
    return Problem(code="data.no-chat-template", message=message, hint=hint)


def check_template(render: Callable[[list[dict[str, Any]]], str], where: str) -> None:
    """Raise ConfigError if the template cannot be compiled or leaves the sandbox. That it refuses some chats is an error of those rows."""
    try:
        render([{"role": "user", "content": "a"}])
    except RowError as refusal:
        error = refusal.__cause__
        if isinstance(error, jinja2.TemplateSyntaxError):
            message = f"the chat template is not valid Jinja: {error.message}"
            problem = Problem(code="model.bad-chat-template", message=message, where=f"{where}:{error.lineno}", hint="correct that line")
            raise ConfigError(problem) from error
        if isinstance(error, jinja2.exceptions.SecurityError):
            message = f"the chat template tries to leave its sandbox: {error}"
            raise ConfigError(Problem(code="model.bad-chat-template", message=message, where=where)) from error


def set_eos(tokenizer: Any, token: str) -> None:
    """Make a token of the vocabulary the end-of-text token, as tokenizer_config.json would. Raises ConfigError if it does not exist."""
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        near = difflib.get_close_matches(token, vocabulary, n=1)
        hint = f"--set {shlex.quote(f'model.eos_token={near[0]}')}" if near else None
        message = f"the vocabulary of the model has no token {token!r}"
        raise ConfigError(Problem(code="model.unknown-token", message=message, where="model.eos_token", hint=hint))
    tokenizer.add_special_tokens({"eos_token": token})


def read_stops(folder: Path) -> tuple[int, ...]:
    """The ids at which the model of a folder stops: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            content: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        ids = content.get("eos_token_id") if isinstance(content, dict) else None
        return tuple(number for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int))
    return ()


def why_no_tokenizer(place: Path, error: Exception | None, *, slow: str | None = None) -> Problem:
    """Why `place` has no fast tokenizer: `error` was raised when it was opened, or its class `slow` is not a fast one."""
    if not place.is_dir():
        return _problem(place, "there is no such folder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (damage := _damage(place / name)) is not None:
            return damage
    if slow is not None:
        return _problem(place, f"{slow} works in Python alone, and only fast tokenizers are used")
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if not (place / "tokenizer.json").is_file():
        if (found := _sentencepiece(place, first)) is not None:
            return found
        if (found := _tiktoken(place, first)) is not None:
            return found
        if (place / "tekken.json").is_file():
            return _problem(place, "tekken.json, the form of Mistral's own tools, is not read, and there is no tokenizer.json")
        if not any(place.glob("vocab*")) and not any(place.glob("*.model")):
            return _problem(place, "there is no tokenizer.json in it, and no other vocabulary")
    if isinstance(error, ImportError):
        return _problem(place, f"its tokenizer works in Python alone ({first}), and only fast tokenizers are used")
    return _problem(place, first)


def _damage(path: Path) -> Problem | None:
    """The problem if the file is a Git LFS pointer, empty, or not valid JSON."""
    if not path.is_file():
        return None
    if is_pointer(path):
        command = pull_command(path)
        message = "it is a Git LFS pointer; the file itself was not fetched" + ("" if command else ": clone it where git-lfs is installed")
        return Problem(code="model.lfs-pointer", message=message, where=str(path), hint=command)
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return _problem(path, "the file is empty" if path.stat().st_size == 0 else f"{path.name} is not valid JSON: {error}")
    return None


def _sentencepiece(place: Path, first: str) -> Problem | None:
    """The problem if the vocabulary is a SentencePiece file of any name."""
    name = _file_beginning_with(place, _SENTENCEPIECE_START)
    if name is None:
        return None
    reason = f"its tokenizer is SentencePiece's {name}, and there is no tokenizer.json beside it"
    missing = [package for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")) if not _is_here(module)]
    if not missing:
        return _problem(place, f"{reason}; transformers cannot convert it: {first}")
    if name != _DEFAULT_NAME and _tokenizer_class(place) is None:
        return _problem(place, f"{reason}, nor a tokenizer_config.json that names the tokenizer_class")
    return _problem(place, f"{reason}; it can be read with {' and '.join(missing)} installed", hint=f"pip install {' '.join(missing)}")


def _tiktoken(place: Path, first: str) -> Problem | None:
    name = _file_beginning_with(place, _TIKTOKEN_LINE)
    if name is None:
        return None
    reason = f"its tokenizer is {name}, a list of tokens in the form of tiktoken, and there is no tokenizer.json beside it"
    if name != _DEFAULT_NAME or _is_here("tiktoken"):
        return _problem(place, f"{reason}; transformers cannot convert it: {first}")
    return _problem(place, f"{reason}; it can be read with tiktoken installed", hint="pip install tiktoken")


def _file_beginning_with(place: Path, pattern: re.Pattern[bytes]) -> str | None:
    """The name of the first file that begins with the pattern; tokenizer.model is tried first."""
    for path in sorted(place.iterdir(), key=lambda path: (path.name != _DEFAULT_NAME, path.name)):
        if path.is_file() and path.suffix not in (".safetensors", ".json", ".bin"):
            with path.open("rb") as file:
                if pattern.match(file.read(1024)):
                    return path.name
    return None


def _tokenizer_class(place: Path) -> Any:
    path = place / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings.get("tokenizer_class") if isinstance(settings, dict) else None


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing too
        return False


def _problem(place: Path, why: str, *, hint: str | None = None) -> Problem:
    message = f"no tokenizer can be loaded from the model folder: {why}"
    return Problem(code="model.no-tokenizer", message=message, where=str(place), hint=hint)
