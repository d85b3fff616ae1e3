"""JSON text to the value that it holds, strictly: no NaN, no key twice in one object, no half of a surrogate pair.

Python's own reader keeps the last of two equal keys in silence, so a model would learn from one of two texts and nobody would know of the
other. Cost: 3 µs for a row of 755 bytes; looking for such keys is one of them.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from json import JSONDecodeError
from typing import Any, NoReturn

_WHITE = " \t\r\n"
_SHOWN = 40


class RepeatedKey(ValueError):
    """A key stands twice in one object, at `path`, like messages[1].content."""

    def __init__(self, path: str, values: list[Any]) -> None:
        shown = " and then ".join(_short(value) for value in values[:3])
        message = f"{path} is there {'twice' if len(values) == 2 else f'{len(values)} times'}: {shown}"
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.path, self.values = path, values


class LoneSurrogate(ValueError):
    """A text holds half of a character."""


class NotFinite(ValueError):
    """NaN or an infinity, which Python reads although JSON has neither."""


class Unusual(dict[str, Any]):
    """An object that holds NaN or an infinity somewhere; whoever reads that part refuses it."""


class _Twice(ValueError):
    """Some key stands twice."""


class _Pairs(list[tuple[str, Any]]):
    """An object with all its keys, as often as they stand there."""


def from_json(text: str) -> Any:
    """The value; JSONDecodeError where the text breaks, another ValueError, in plain words, where it means nothing that can be used."""
    return _usable(text, _DECODER, _WHOLE)


def _usable(text: str, decoder: json.JSONDecoder, whole: json.JSONDecoder) -> Any:
    try:
        value = _read(text, decoder)
    except (JSONDecodeError, NotFinite):
        raise
    except _Twice as error:
        raise _repeated(text, whole) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:  # Python's own words are of its settings
        raise ValueError("a number has too many digits") from error
    if "\\u" in text and not can_be_written(value):
        raise LoneSurrogate("half of a surrogate pair (\\ud800 to \\udfff) is not a character")
    return value


def with_not_finite(text: str) -> Any:
    """The value of a text with NaN or infinities in it, an object as Unusual; raises as from_json does for all else."""
    value = _usable(text, _LENIENT, _LENIENT_WHOLE)
    return Unusual(value) if isinstance(value, dict) else value


def not_finite_at(value: object) -> str | None:
    """The path to the first NaN or infinity in the value, such as `.turns[0].weight`; "" where it is the value itself."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    pairs: Iterable[tuple[str, object]] = ()
    if isinstance(value, dict):
        pairs = ((f".{key}", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        pairs = ((f"[{number}]", part) for number, part in enumerate(value))
    return next((step + found for step, part in pairs if (found := not_finite_at(part)) is not None), None)


def can_be_written(value: object) -> bool:
    """Whether the value's texts are characters alone; half a surrogate pair is none."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def without_repeats(text: str) -> Any:
    """The value of a text with a RepeatedKey; None where the values of such a key differ, for then nobody knows which is meant."""
    differ = False

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal differ
        found: dict[str, Any] = {}
        for key, value in pairs:
            differ = differ or found.setdefault(key, value) != value
        return found

    value = json.loads(text, object_pairs_hook=build)
    return None if differ else value


def _read(text: str, decoder: json.JSONDecoder) -> Any:
    if text[:1] != "{":  # json.loads tells of the byte order mark
        return json.loads(text) if text.startswith("\ufeff") else decoder.decode(text)
    value, end = decoder.raw_decode(text)  # a third faster than decode, which looks for white space with two patterns
    rest = text[end:].lstrip(_WHITE)
    if rest:
        raise JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Twice
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise NotFinite(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
"""Made once: json.loads makes one for each row, a fifth of the time of a short one."""
_LENIENT = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT_WHOLE = json.JSONDecoder(object_pairs_hook=_Pairs)
_WHOLE = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_refuse_constant)


def _repeated(text: str, decoder: json.JSONDecoder) -> ValueError:
    """What is wrong with a text in which a key stands twice: that, or what breaks it further on."""
    try:
        found = _first_repeated(_read(text, decoder), "")
    except (RecursionError, ValueError) as error:
        if isinstance(error, JSONDecodeError | NotFinite):
            return error
        return ValueError("nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits")
    assert found is not None
    return found


def _first_repeated(value: object, path: str) -> RepeatedKey | None:
    if isinstance(value, _Pairs):
        twice = next((name for name, count in Counter(name for name, _ in value).items() if count > 1), None)
        if twice is not None:
            return RepeatedKey(f"{path}.{twice}".removeprefix("."), [_plain(part) for name, part in value if name == twice])
        parts = [(f"{path}.{name}".removeprefix("."), part) for name, part in value]
    elif isinstance(value, list):
        parts = [(f"{path}[{number}]", part) for number, part in enumerate(value)]
    else:
        return None
    return next((found for inner, part in parts if (found := _first_repeated(part, inner)) is not None), None)


def _plain(value: object) -> Any:
    if isinstance(value, _Pairs):
        return {name: _plain(part) for name, part in value}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
