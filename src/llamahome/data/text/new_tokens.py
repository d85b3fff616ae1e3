"""The new tokens of model.new_tokens: read and checked, added to a tokenizer, and written into the tokenizer files of a saved model.

A new token is matched in a text exactly as it is written, before all other tokens, also within a word. It is not special: texts may contain
it, and it stays in decoded answers.
"""

import difflib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamahome.errors import ConfigError, Problem

_KEY = "model.new_tokens"


class NewToken(NamedTuple):
    """A token that was added to the tokenizer of a base."""

    text: str
    number: int
    """Its id."""
    pieces: tuple[int, ...]
    """The tokens that its text had before."""


def read_new_tokens(setting: str | Sequence[str]) -> tuple[str, ...]:
    """The tokens of model.new_tokens, which is a list or a text file with one token a line.

    Raises ConfigError with every token that is empty, has white space around it, or is there twice.
    """
    named, tokens = (_KEY, list(setting)) if not isinstance(setting, str) else (setting, _lines(setting))
    problems, seen = [], dict[str, str]()
    if not tokens and isinstance(setting, str):
        problems.append(_problem("the file holds no new token", setting, hint="write one a line, or --set model.new_tokens=[]"))
    for number, token in enumerate(tokens, start=1):
        where = f"{named}:{number}" if isinstance(setting, str) else f"{_KEY}[{number - 1}]"
        if not token.strip():
            problems.append(_problem("a new token is empty or only white space", where, hint="leave it out"))
        elif token != token.strip():
            message = f"the new token {token!r} has white space around it, which would belong to the token"
            problems.append(_problem(message, where, hint=f"write {token.strip()!r}"))
        elif token in seen:
            problems.append(_problem(f"the new token {token!r} is there twice, first at {seen[token]}", where, hint="leave one out"))
        seen.setdefault(token, where)
    if problems:
        raise ConfigError(problems)
    return tuple(tokens)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()  # without a byte order mark, which would belong to a token
    except UnicodeDecodeError as error:
        message = "cannot read a file of new tokens: it is not UTF-8"
        raise ConfigError(_problem(message, path, hint="save it as UTF-8, one token a line")) from error
    except OSError as error:
        near = difflib.get_close_matches(Path(path).name, [file.name for file in Path(path).parent.glob("*") if file.is_file()], n=1)
        value = str(Path(path).parent / near[0]) if near else f"[{json.dumps(path, ensure_ascii=False)}]"
        hint = f"--set {shlex.quote(f'{_KEY}={value}')}" + ("" if near else " for a token of this text")
        raise ConfigError(_problem(f"cannot read a file of new tokens: {error.strerror}", path, hint=hint)) from error


def add_new_tokens(tokenizer: Any, added: Sequence[Any]) -> tuple[NewToken, ...]:
    """Add the tokens `added` (AddedToken) to a fast tokenizer of transformers.

    Raises ConfigError with every one that it has already, or that it could not decode.
    """
    vocabulary, backend, tokens = tokenizer.get_vocab(), tokenizer.backend_tokenizer, [each.content for each in added]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    pieces = {token: tuple(backend.encode(token, add_special_tokens=False).ids) for token in tokens}
    problems = []
    for token in tokens:
        known = vocabulary.get(token, pieces[token][0] if len(pieces[token]) == 1 and backend.decode(pieces[token]) == token else None)
        inside = next((text for text in special if text in token), None)
        if known is not None:
            problems.append(_problem(f"the tokenizer has {token!r} already, as token {known:,}", _KEY, hint="leave it out"))
        elif inside is not None:
            problems.append(_problem(f"the new token {token!r} contains the special token {inside}", _KEY, hint="another text"))
    if problems:
        raise ConfigError(problems)
    tokenizer.add_tokens(list(added))
    numbers, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    problems = [_other_text(token, written) for token in tokens if (written := backend.decode([numbers[token]])) != token]
    if problems:
        raise ConfigError(problems)
    return tuple(NewToken(token, numbers[token], tuple(each for each in pieces[token] if each != unknown)) for token in tokens)


def write_new_tokens(folder: Path, tokens: Sequence[NewToken], files: Mapping[str, str]) -> None:
    """Add `tokens` to the tokenizer files of a base that were copied into `folder`.

    `files` are those of ChatTokenizer.describe; tokenizer.json is taken from them if the base has none.
    """
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8") if path.is_file() else files[path.name])
    known = {entry["id"] for entry in content.setdefault("added_tokens", [])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] += [{"id": token.number, "content": token.text, **flags} for token in tokens if token.number not in known]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else json.loads(files[settings.name])
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(token.number): {"content": token.text, **flags} for token in tokens}
    settings.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _other_text(token: str, written: str) -> Problem:
    """A byte-level tokenizer decodes the letters of an added token as bytes if each of them stands for one, as U+00FC does."""
    return _problem(f"the new token {token!r} would be decoded as {written!r} by this tokenizer", _KEY, hint="a token of ASCII letters")


def _problem(message: str, where: str, *, hint: str | None = None) -> Problem:
    return Problem(code="model.bad-new-token", message=message, where=where, hint=hint)
