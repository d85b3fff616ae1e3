"""Replaces secrets in texts that are written to files or shown: logs, error blocks, settings, environment.json, events, status.json.

A secret is the value of an environment variable whose name says so (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...), wherever it
stands; user and password of a URL, and its parameters with such names; an option or assignment with such a name; and a word in the form of
well-known tokens. Special tokens of a vocabulary (eos_token) and numbers of tokens are none.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_LEAST_LETTERS = 8
"""A shorter value of a variable is not replaced, because it stands in other words, too."""
_NAME = r"(?:token|secret|password|passwd|passphrase|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|secret[_-]?key|auth[_-]?key)"
_SECRET_NAME = re.compile(rf"(?:^|.*[^a-z0-9])(?:{_NAME}|key)", re.IGNORECASE)
_NO_SECRET = re.compile(
    r"(?:.*[^a-z0-9])?(?:eos|bos|pad|unk|sep|cls|mask|image|end|stop|special|turn|sort|cache)[_-](?:token|key)", re.IGNORECASE
)
_URL_USER = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@\"']+@", re.IGNORECASE)
_URL_PARAMETER = re.compile(rf"([?&][\w.-]*(?:{_NAME}|key|signature|sig)=)[^&\s\"'#]+", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?<![\w?&.-])(-{0,2})([A-Za-z][\w.-]*)(=|[\"']\s*:\s*)([\"']?)([^\s\"',;]+)")
_OPTION = re.compile(r"(--[\w-]+)(\s+)([^\s-][^\s\"']*)")
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[opsru]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16})\b|(?<=\bBearer )[\w.~+/=-]{8,}|(?<=\bBasic )[\w+/=-]{8,}"
)


def names_secret(name: str) -> bool:
    """Whether something of this name is a secret: hf_token and api-key are, eos_token and micro_batch_tokens are not."""
    return _SECRET_NAME.fullmatch(name) is not None and _NO_SECRET.fullmatch(name) is None


def redact(text: str, environment: Mapping[str, str] = os.environ, *, options: bool = True) -> str:
    """The text with *** for every secret in it. Without an `environment`, what its variables hold is not looked for.

    Without `options`, what follows an option such as --token stays: a help line that offers a new one has to be typed as it is.
    """
    for value in sorted(_secret_values(environment), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _URL_PARAMETER.sub(rf"\1{HIDDEN}", _URL_USER.sub(rf"\1{HIDDEN}@", text))
    if options:
        text = _OPTION.sub(lambda found: f"{found[1]}{found[2]}{HIDDEN if names_secret(found[1].lstrip('-')) else found[3]}", text)
    return _SHAPES.sub(HIDDEN, _ASSIGNED.sub(_assigned, text))


def redact_words(words: Sequence[str]) -> list[str]:
    """The words of a command line with *** for every secret."""
    return [HIDDEN if number and _takes_secret(words[number - 1]) else redact(word) for number, word in enumerate(words)]


def redact_values(value: Any) -> Any:
    """Plain values as JSON has them, with *** for every secret, by the name of its key or by its form."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: HIDDEN if isinstance(each, str) and names_secret(str(key)) else redact_values(each) for key, each in value.items()}
    return [redact_values(each) for each in value] if isinstance(value, list | tuple) else value


def _takes_secret(option: str) -> bool:
    return option.startswith("--") and "=" not in option and names_secret(option.lstrip("-"))


def _assigned(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}{found[3]}{found[4]}{HIDDEN if names_secret(found[2]) else found[5]}"


def _secret_values(environment: Mapping[str, str]) -> list[str]:
    named = ((name, value) for name, value in environment.items() if not name.startswith("LLAMAHOME_") and names_secret(name))
    return [value for _, value in named if len(value) >= _LEAST_LETTERS]
