"""Checks one value against one key of the schema, and says in plain words what is wrong with it.

Pydantic decides, in strict mode: text is not taken for a number, nor a number for a truth value. The messages are ours.
"""

from dataclasses import dataclass
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from llamahome.config.describe import Setting, nearest
from llamahome.config.objectives import LEARNS
from llamahome.config.yamltext import YamlTrouble, read_value, write_value

_MEANT = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_OTHER_METHODS: dict[str, str] = {"qlora": "model.quantization=nf4", **{name: f"training.objective={name}" for name in LEARNS}}
"""What others call methods, and the setting that it is here."""
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


@dataclass(frozen=True)
class InvalidValue:
    """Why a value was refused."""

    code: str
    message: str
    hint: str
    correction: str | None = None
    """How to write the value that was probably meant."""


def validate(setting: Setting, value: Any) -> tuple[Any, InvalidValue | None]:
    """The value as the schema keeps it, or None and why it was refused."""
    try:
        section = setting.model.model_validate({setting.name: value}, strict=True)
    except ValidationError as error:
        return None, _explain(setting, value, error)
    return getattr(section, setting.attribute), None


def _explain(setting: Setting, value: Any, error: ValidationError) -> InvalidValue:
    kinds, explain = setting.kinds, f"llamahome config explain {setting.key}"
    for detail in error.errors(include_url=False, include_input=False):
        if detail["type"] == "value_error":  # raised by a validator of ours, whose message says more
            return InvalidValue("config.bad-value", f"{setting.key}: {detail['ctx']['error']}", explain)
    expected = f"{setting.key}: expected {setting.describe_values()}"
    if _is_number(value) and ("number" in kinds or ("integer" in kinds and isinstance(value, int))):
        return InvalidValue("config.out-of-range", f"{expected}; got {_show(value)}", explain)
    if value is None:
        hint = explain if setting.default is None else f"leave it out for the default, {write_value(setting.default)}"
        return InvalidValue("config.null", f"{expected}; got nothing (null)", hint)
    correction = _other_spelling(setting, value)
    if isinstance(value, str) and setting.words and "string" not in kinds:
        meant = _meant_word(value, setting.words)
        guess = f" (did you mean {meant}?)" if meant else ""
        takes_number = bool(kinds & {"integer", "number"})
        if setting.key == "training.method" and value.casefold() in _OTHER_METHODS:
            return InvalidValue("config.bad-choice", f"{expected}; got {_show(value)}", f"--set {_OTHER_METHODS[value.casefold()]}")
        code, kind = ("config.wrong-type", "the text ") if takes_number else ("config.bad-choice", "")
        return InvalidValue(code, f"{expected}; got {kind}{_show(value)}{guess}", explain, correction or meant)
    return InvalidValue("config.wrong-type", f"{expected}; got {_kind(value)}", explain, correction)


def _meant_word(text: str, words: list[str]) -> str | None:
    meant = nearest(text, words) or _MEANT.get(text.casefold())
    return meant if meant in words else None


def _other_spelling(setting: Setting, value: Any) -> str | None:
    """How the same value is accepted: a number without quotes, a whole number without a point, text with quotes."""
    candidates: list[Any] = []
    if isinstance(value, str):
        try:
            candidates.append(read_value(value))
        except YamlTrouble:
            return None
        if _MEANT.get(value.casefold()):
            candidates.append(_MEANT[value.casefold()] == "true")
        if "array" in setting.kinds:
            candidates.append([value])
    elif isinstance(value, float) and value.is_integer():
        candidates.append(int(value))
    elif isinstance(value, (int, float)):
        candidates.append(write_value(value))
    return next((write_value(other) for other in candidates if other is not None and _accepts(setting, other)), None)


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
