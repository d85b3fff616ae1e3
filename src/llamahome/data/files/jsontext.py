"""A strict JSON reader: it refuses NaN, repeated keys in an object, and half of a surrogate pair.

Python's own reader silently keeps the last of two equal keys, so a model would learn one of two texts and nobody would know of the other.
Cost: 3 µs for a row of 755 bytes, 1 µs of it to look for such keys.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from json import JSONDecodeError
from typing import Any, NoReturn

_WHITE = " \t\r\n"
_SHOWN = 40


class RepeatedKey(ValueError):
    """An object has a key more than once, at `path`, such as messages[1].content."""

    def __init__(self, path: str, values: list[Any]) -> None:
        shown = " and then ".join(_short(value) for value in values[:3])
        message = f"{path} is there {'twice' if len(values) == 2 else f'{len(values)} times'}: {shown}"
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.path, self.values = path, values


class LoneSurrogate(ValueError):
    """A text holds half of a surrogate pair, which is not a character."""


class NotFinite(ValueError):
    """NaN or an infinity, which Python reads although JSON has neither."""


class Unusual(dict[str, Any]):
    """An object that holds NaN or an infinity somewhere; it is refused only if that part is used."""


class _HasRepeats(ValueError):
    """Some object has a key more than once."""


class _Pairs(list[tuple[str, Any]]):
    """An object as key and value pairs, so that repeated keys are kept."""


def from_json(text: str) -> Any:
    """The value; JSONDecodeError if the text is not JSON, another ValueError in plain words if its value cannot be used."""
    if text[:1] == "{":  # nearly every row is one good object; what is wrong with another is found by the calls below
        try:
            value, end = _SCAN(text, 0)
        except (StopIteration, ValueError, RecursionError):
            return _decode(text, _DECODER, _PAIRS_DECODER)
        if not text[end:].strip(_WHITE) and ("\\u" not in text or can_be_written(value)):
            return value
    return _decode(text, _DECODER, _PAIRS_DECODER)


def with_not_finite(text: str) -> Any:
    """The value of a text with NaN or infinities in it, an object as Unusual; otherwise raises as from_json does."""
    value = _decode(text, _LENIENT, _LENIENT_PAIRS)
    return Unusual(value) if isinstance(value, dict) else value


def json_or_none(text: str | bytes) -> Any:
    """The value of a text as Python's json reads it, a byte order mark skipped; None if it is not JSON."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError):
        return None


def _decode(text: str, decoder: json.JSONDecoder, pairs_decoder: json.JSONDecoder) -> Any:
    try:
        value = _parse(text, decoder)
    except _HasRepeats:
        raise _repeated(_parse(text, pairs_decoder)) from None  # _parse raises if the text breaks after the repeated key
    if "\\u" in text and not can_be_written(value):
        raise LoneSurrogate("half of a surrogate pair (\\ud800 to \\udfff) is not a character")
    return value


def _parse(text: str, decoder: json.JSONDecoder) -> Any:
    """The value; Python's errors about depth and digits in plain words."""
    try:
        return _parse_whole(text, decoder)
    except (JSONDecodeError, NotFinite, _HasRepeats):
        raise
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:  # Python's message is about its settings
        raise ValueError("a number has too many digits") from error


def not_finite_at(value: object) -> str | None:
    """The path to the first NaN or infinity in the value, such as `.turns[0].weight`; "" if it is the value itself."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    pairs: Iterable[tuple[str, object]] = ()
    if isinstance(value, dict):
        pairs = ((f".{key}", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        pairs = ((f"[{number}]", part) for number, part in enumerate(value))
    return next((step + rest for step, part in pairs if (rest := not_finite_at(part)) is not None), None)


def can_be_written(value: object) -> bool:
    """Whether the value can be encoded in UTF-8; half of a surrogate pair cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def without_repeats(text: str) -> Any:
    """The value of a text with a RepeatedKey; None if the values of such a key differ, because it is not known which is right."""
    differ = False

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal differ
        built: dict[str, Any] = {}
        for key, value in pairs:
            differ = differ or built.setdefault(key, value) != value
        return built

    value = json.loads(text, object_pairs_hook=build)
    return None if differ else value


def _parse_whole(text: str, decoder: json.JSONDecoder) -> Any:
    if text[:1] != "{":
        return json.loads(text) if text.startswith("\ufeff") else decoder.decode(text)  # json.loads has a message for the mark
    value, end = decoder.raw_decode(text)  # a third faster than decode, which looks for white space with two patterns
    rest = text[end:].lstrip(_WHITE)
    if rest:
        raise JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        raise _HasRepeats
    return built


def _refuse_constant(name: str) -> NoReturn:
    raise NotFinite(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
"""Made once: json.loads makes one for each row, a fifth of the time of a short one."""
_SCAN: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]
"""Its scanner, which reads a value from a place on; measured: half a microsecond less than through the decoder's own methods."""
_LENIENT = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT_PAIRS = json.JSONDecoder(object_pairs_hook=_Pairs)
_PAIRS_DECODER = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_refuse_constant)


def _repeated(value: object) -> ValueError:
    try:
        error = _first_repeated(value, "")
    except RecursionError:
        return ValueError("nested too deeply")
    assert error is not None
    return error


def _first_repeated(value: object, path: str) -> RepeatedKey | None:
    if isinstance(value, _Pairs):
        repeated = next((name for name, count in Counter(name for name, _ in value).items() if count > 1), None)
        if repeated is not None:
            return RepeatedKey(f"{path}.{repeated}".removeprefix("."), [_plain(part) for name, part in value if name == repeated])
        parts = [(f"{path}.{name}".removeprefix("."), part) for name, part in value]
    elif isinstance(value, list):
        parts = [(f"{path}[{number}]", part) for number, part in enumerate(value)]
    else:
        return None
    return next((error for inner, part in parts if (error := _first_repeated(part, inner)) is not None), None)


def _plain(value: object) -> Any:
    if isinstance(value, _Pairs):
        return {name: _plain(part) for name, part in value}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
