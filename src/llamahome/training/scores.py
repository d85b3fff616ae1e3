"""Scores of a generated answer against the reference answer: exact match, token F1, ROUGE-L, JSON, or a function of the user's.

Every built-in score is a number from 0 to 1, and higher is better. All are invariant to Unicode composition (NFC).

    exact       1 if both texts are equal after white space at both ends is removed and each run of it inside is one space. Case counts.
    f1          The F1 of words that both have, as in SQuAD: case, punctuation and the articles a, an, the are ignored. If nothing else
                is left of one text, 1 if both are equal but for case and white space.
    rouge       ROUGE-L: the F-measure of the longest common subsequence of words; case and punctuation are ignored, articles count.
    json        1 if the whole answer is valid JSON: no text or fence around it, no NaN, no repeated key.
    json_equal  1 if answer and reference are the same JSON value: the order of keys and the spelling of numbers do not matter.

In scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character counts as a word.
Sources: SQuAD, arXiv 1606.05250; ROUGE-L, Lin 2004; longest common subsequence on the bits of an integer, Hyyrö 2004.
"""

import difflib
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.data.files.jsontext import from_json
from llamahome.errors import ConfigError, Problem
from llamahome.training.metric_file import load_function

_SPACE = re.compile(r"\s+")
_ARTICLES = frozenset({"a", "an", "the"})
_NO_SPACES = re.compile(
    "["
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9d"  # radicals, kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "]"
)


@dataclass(frozen=True)
class Metric:
    """A score of one answer."""

    name: str
    score: Callable[..., float]
    """(prompt, answer, reference) to a number, higher is better; from 0 to 1 but for a function of the user's. Takes also row=, the row
    as it is in the data, and where=, its place for error messages. Raises ConfigError if a function of the user's fails."""
    is_share: bool = True
    """Whether the score is from 0 to 1 and is shown in percent."""
    needs_row: bool = False
    """Whether the function of the user's reads the row itself, so that row= must be given."""


def open_metric(name: str) -> Metric:
    """The metric `exact`, `f1`, `rouge`, `json`, `json_equal`, or a function as `FILE.py:FUNCTION`.

    The file is run once, as `python FILE.py` would run it. The function takes (answer, reference), (answer, reference, prompt), or
    (answer, reference, row) with the row as a dict, and returns a number. Raises ConfigError if there is no such metric or function.
    """
    if name in BUILT_IN:
        score = BUILT_IN[name]
        return Metric(name, lambda prompt, answer, reference, *, row=None, where=None: score(answer, reference))
    if name.endswith(".py") or ".py:" in name:
        function = load_function(name)
        return Metric(function.name, function.score, is_share=False, needs_row=function.third == "row")
    close = difflib.get_close_matches(name.lower(), BUILT_IN, n=1)
    known = f"{', '.join(BUILT_IN)}, and a function of yours as FILE.py:FUNCTION"
    message = f"there is no metric {name!r}; there are {known}"
    hint = f"--metric {close[0]}" if close else None
    raise ConfigError(Problem(code="evaluation.unknown-metric", message=message, where="--metric", hint=hint))


def exact(answer: str, reference: str) -> float:
    """1 if both are equal but for white space, else 0."""
    return float(_spaced(answer) == _spaced(reference))


def token_f1(answer: str, reference: str) -> float:
    """The harmonic mean of the shares of words of each text that the other has too, each word as often as it occurs."""
    found, wanted = _squad_words(answer), _squad_words(reference)
    if not found or not wanted:
        return float(_spaced(answer).casefold() == _spaced(reference).casefold())
    return _f_measure((Counter(found) & Counter(wanted)).total(), len(found), len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """The F-measure of the longest common subsequence of the words of both texts."""
    found, wanted = _words(answer, " "), _words(reference, " ")
    if not found or not wanted:
        return float(_spaced(answer).casefold() == _spaced(reference).casefold())
    return _f_measure(common_subsequence(found, wanted), len(found), len(wanted))


def json_valid(answer: str, reference: str = "") -> float:
    """1 if the answer is JSON, else 0."""
    return float(_json_or_none(answer) is not None)


def json_equal(answer: str, reference: str) -> float:
    """1 if both are JSON and the same value, else 0."""
    found, wanted = _json_or_none(answer), _json_or_none(reference)
    return float(found is not None and found == wanted)


def is_json_container(text: str) -> bool:
    """Whether the text is a JSON object or array."""
    return text.lstrip()[:1] in ("{", "[") and _json_or_none(text) is not None


BUILT_IN: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "f1": token_f1,
    "rouge": rouge_l,
    "json": json_valid,
    "json_equal": json_equal,
}
"""The metrics that are known by name."""


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence; time len(first) * len(second) / 64."""
    places: dict[str, int] = {}
    for number, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << number
    every = (1 << len(first)) - 1
    left = every
    for word in second:
        shared = left & places.get(word, 0)
        left = ((left + shared) | (left - shared)) & every
    return len(first) - left.bit_count()


def _f_measure(shared: int, found: int, wanted: int) -> float:
    """2PR / (P + R) with precision P = shared / found and recall R = shared / wanted."""
    return 2 * shared / (found + wanted)


def _spaced(text: str) -> str:
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip()


def _words(text: str, instead: str) -> list[str]:
    """Words in lower case; `instead` stands in the place of punctuation."""
    lower = unicodedata.normalize("NFC", text.casefold())
    kept = "".join(instead if _is_punctuation(character) else character for character in lower)
    return [piece for word in kept.split() for piece in _pieces(word)]


def _squad_words(text: str) -> list[str]:
    return [word for word in _words(text, "") if word not in _ARTICLES]


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


def _pieces(word: str) -> list[str]:
    """The word, or the characters of its parts in a script without spaces, each with the marks that belong to it."""
    if not _NO_SPACES.search(word):
        return [word]
    pieces: list[str] = []
    alone = True
    for character in word:
        combines = unicodedata.category(character)[0] == "M"
        single = _NO_SPACES.match(character) is not None
        if pieces and (combines or not (single or alone)):
            pieces[-1] += character
        else:
            pieces.append(character)
        alone = alone if combines else single
    return pieces


def _json_or_none(text: str) -> str | None:
    """The JSON value of the text in one spelling; None if it is not JSON."""
    try:
        return json.dumps(_plain(from_json(text.strip())), sort_keys=True)
    except (ValueError, RecursionError, OverflowError):
        return None


def _plain(value: Any) -> Any:
    """The value with whole floats as integers, because 1.0 and 1 are one number in JSON."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
