"""Judges one value against one key of the schema and says in plain words what is wrong with it.

The verdict is pydantic's in strict mode (no text is taken for a number, no number for a truth value); the words are ours.
"""

from dataclasses import dataclass
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from llamahome.config.describe import Setting, nearest
from llamahome.config.yamltext import YamlTrouble, read_value, write_value

_MEANT = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


@dataclass(frozen=True)
class Fault:
    """Why a value was refused."""

    code: str
    message: str
    hint: str
    remedy: str | None = None
    """The value as it should be written, where that can be told."""


def judge(setting: Setting, value: Any) -> tuple[Any, Fault | None]:
    """The value as the schema keeps it, or the fault that refuses it (then the value is None)."""
    try:
        section = setting.model.model_validate({setting.name: value}, strict=True)
    except ValidationError as error:
        return None, _fault(setting, value, error)
    return getattr(section, setting.attribute), None


def _fault(setting: Setting, value: Any, error: ValidationError) -> Fault:
    shape = setting.shape
    explain = f"llamahome config explain {setting.key}"
    details = error.errors(include_url=False, include_input=False)
    own = next((detail["ctx"]["error"] for detail in details if detail["type"] == "value_error"), None)
    if own is not None:
        return Fault("config.bad-value", f"{setting.key}: {own}", explain)
    expected = f"{setting.key}: expected {shape.describe()}"
    if _is_number(value) and shape.number and not (shape.number == "whole" and isinstance(value, float)):
        return Fault("config.out-of-range", f"{expected}; got {_show(value)}", explain)
    if value is None:
        hint = explain if setting.default is None else f"leave the line out for the default, {write_value(setting.default)}"
        return Fault("config.null", f"{expected}; got nothing (null)", hint)
    remedy = _other_spelling(setting, value)
    if isinstance(value, str) and shape.words and not shape.text:
        meant = _meant_word(value, shape.words)
        guess = f" (did you mean {meant}?)" if meant else ""
        kind = "" if not shape.number else "the text "
        code = "config.wrong-type" if shape.number else "config.bad-choice"
        return Fault(code, f"{expected}; got {kind}{_show(value)}{guess}", explain, remedy or meant)
    return Fault("config.wrong-type", f"{expected}; got {_kind(value)}", explain, remedy)


def _meant_word(text: str, words: tuple[str, ...]) -> str | None:
    same = nearest(text, words)
    if same:
        return same
    meant = _MEANT.get(text.casefold())
    return meant if meant in words else None


def _other_spelling(setting: Setting, value: Any) -> str | None:
    """How the same value would be accepted: a number without quotes, a whole number without a point, a text with quotes."""
    tries: list[Any] = []
    if isinstance(value, str):
        try:
            tries.append(read_value(value))
        except YamlTrouble:
            return None
        if _MEANT.get(value.casefold()):
            tries.append(_MEANT[value.casefold()] == "true")
        if setting.shape.texts:
            tries.append([value])
    elif isinstance(value, float) and value.is_integer():
        tries.append(int(value))
    elif isinstance(value, (int, float)):
        tries.append(write_value(value))
    for other in tries:
        if other is not None and _accepts(setting, other):
            return write_value(other)
    return None


def _accepts(setting: Setting, value: Any) -> bool:
    try:
        setting.model.model_validate({setting.name: value}, strict=True)
    except ValidationError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return f"the truth value {write_value(value)}"
    for kind, word in ((str, "text"), ((int, float), "number"), ((list, tuple), "list"), (dict, "mapping")):
        if isinstance(value, kind):
            return f"the {word} {_show(value)}"
    return f"{_show(value)} ({type(value).__name__})"


def _show(value: Any) -> str:
    return write_value(value) if isinstance(value, bool) else _SHORT.repr(value)
