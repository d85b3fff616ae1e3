"""Why a model folder gives no fast tokenizer: which file its vocabulary is in, and what would read it. Nothing is loaded.

What is said of packages was tried with transformers 5.23: with sentencepiece (and protobuf) it makes a fast tokenizer of a SentencePiece
file, with tiktoken of a list of tokens; a tokenizer whose class is written in Python stays slow whatever is installed.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llamahome.errors import Problem
from llamahome.lfs import is_pointer, pull_command

_PIECE = re.compile(rb"\n[\x04-\x7f]\n[\x01-\x7f]")
"""How SentencePiece's protocol buffer begins: the first piece, in it its text."""
_RANKED = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""A line of tiktoken's lists: the bytes of a token in base64, and its number."""
_READ_ALWAYS = "tokenizer.model"
"""The one name under which transformers finds a SentencePiece file although no tokenizer class is named."""


def why_no_tokenizer(place: Path, error: Exception | None, *, slow: str | None = None) -> Problem:
    """What keeps `place` from having a fast tokenizer: after `error` while opening it, or because its class, `slow`, is no fast one."""
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
    """A pointer, an empty file, or JSON that is none."""
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
    """Its vocabulary is a SentencePiece file, under whatever name."""
    name = _file_that_begins(place, _PIECE)
    if name is None:
        return None
    told = f"its tokenizer is SentencePiece's {name}, and there is no tokenizer.json beside it"
    missing = [package for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")) if not _is_here(module)]
    if not missing:
        return _problem(place, f"{told}; transformers cannot convert it: {first}")
    if name != _READ_ALWAYS and _tokenizer_class(place) is None:
        return _problem(place, f"{told}, nor a tokenizer_config.json that names the tokenizer_class")
    return _problem(place, f"{told}; it can be read with {' and '.join(missing)} installed", hint=f"pip install {' '.join(missing)}")


def _tiktoken(place: Path, first: str) -> Problem | None:
    name = _file_that_begins(place, _RANKED)
    if name is None:
        return None
    told = f"its tokenizer is {name}, a list of tokens in the form of tiktoken, and there is no tokenizer.json beside it"
    if name != _READ_ALWAYS or _is_here("tiktoken"):
        return _problem(place, f"{told}; transformers cannot convert it: {first}")
    return _problem(place, f"{told}; it can be read with tiktoken installed", hint="pip install tiktoken")


def _file_that_begins(place: Path, pattern: re.Pattern[bytes]) -> str | None:
    """The first file that begins so; tokenizer.model before all others."""
    for path in sorted(place.iterdir(), key=lambda path: (path.name != _READ_ALWAYS, path.name)):
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
    except ModuleNotFoundError:  # not even the package around it
        return False


def _problem(place: Path, why: str, *, hint: str | None = None) -> Problem:
    message = f"no tokenizer can be loaded from the model folder: {why}"
    return Problem(code="model.no-tokenizer", message=message, where=str(place), hint=hint)
