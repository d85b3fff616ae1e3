"""Calls with which a short template makes a long text or a long calculation: each is refused before it is done.

Texts grow by repeating, padding, replacing and joining, numbers by multiplying; a search from the right and a strip compare every character
with every other one. Filters and methods that no chat template needs and whose cost cannot be foretold are not there.
"""

import re
import types
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter

Allow = Callable[[int], None]
"""Raises TooCostly for a value of so many characters or values."""

REMOVED_FILTERS = ("batch", "center", "filesizeformat", "random", "slice", "striptags", "sum", "urlize", "wordwrap", "xmlattr")
REMOVED_METHODS = frozenset({"expandtabs", "from_bytes", "maketrans", "to_bytes", "translate"})
_PADDING = frozenset({"center", "ljust", "rjust", "zfill"})
_COMPARING = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"})
_MAX_COMPARISONS = 1 << 30
_MAX_BITS = 4096
"""Of an integer that is calculated with."""
_MAX_WIDTH = 1000
"""Of a field in a format, of an indentation, and of the digits of a number."""
_WIDE = re.compile(r"\d{4}|\*")
_METHODS = (types.BuiltinMethodType, types.MethodType)
_SIZED = (str, bytes, list, tuple)


class TooCostly(jinja2.TemplateRuntimeError):
    """A template would take too much time or memory."""


def check_operator(operator: str, left: Any, right: Any) -> int:
    """The size of what an operator gives, before it is calculated. Raises TooCostly."""
    for value in (left, right):
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise TooCostly(f"it calculates with an integer of more than {_MAX_BITS} bits")
    if operator == "+" and isinstance(left, _SIZED) and isinstance(right, _SIZED):
        return len(left) + len(right)
    if operator == "*":
        count, value = (left, right) if isinstance(left, int) else (right, left)
        return len(value) * max(count, 0) if isinstance(count, int) and isinstance(value, _SIZED) else 0
    is_power = operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(left) > 1
    if is_power and left.bit_length() * right > _MAX_BITS:
        raise TooCostly(f"it calculates an integer of more than {_MAX_BITS} bits")
    if operator == "%" and isinstance(left, str | bytes):
        _check_format(left)
    return 0


def check_call(function: Any, arguments: Sequence[Any], named: Mapping[str, Any], allow: Allow) -> int:
    """The work of a call, in characters, before it is done. Raises TooCostly."""
    owner = getattr(function, "__self__", None)
    if not isinstance(function, _METHODS) or not isinstance(owner, str | bytes):
        return 0
    name = function.__name__
    if name in _PADDING and isinstance(width := arguments[0] if arguments else 0, int):
        allow(width)
    elif name == "replace" and len(arguments) + len(named) >= 2:
        old, new = (*arguments, *named.values())[:2]
        if isinstance(old, str | bytes) and isinstance(new, str | bytes):
            allow(_replaced(owner, old, new))
    elif name == "join" and arguments:
        if not isinstance(arguments[0], list | tuple | dict | str | bytes):
            raise TooCostly("it joins something else than a list")
        allow(_joined(owner, arguments[0]))
    elif name in _COMPARING and arguments and isinstance(arguments[0], str | bytes):
        return _compared(owner, arguments[0])
    return 0


def _replaced(text: Any, old: Any, new: Any) -> int:
    """The length of a text in which `old` is replaced by `new`."""
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new) if isinstance(old, type(text)) else 0


def _joined(separator: Any, parts: Any) -> int:
    return len(separator) * len(parts) + sum(len(part) for part in parts if isinstance(part, str | bytes))


def _compared(text: Any, other: Any) -> int:
    """The work of comparing characters of `text` with those of `other`, as much as copying so many characters."""
    if len(text) * len(other) > _MAX_COMPARISONS:
        raise TooCostly("it searches a long text for a long text")
    return len(text) * len(other) >> 7


def _check_format(text: Any) -> None:
    if _WIDE.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise TooCostly(f"it formats a text with a field of {_MAX_WIDTH} characters or more")


class _LimitedFormatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        _check_format(format_spec)
        return Formatter.format_field(self, value, format_spec)


def limited_format(environment: SandboxedEnvironment, method: Any) -> Callable[..., str] | None:
    """The method `str.format` or `str.format_map` in the sandbox and without wide fields; None for every other value."""
    if not isinstance(method, _METHODS) or method.__name__ not in ("format", "format_map"):
        return None
    text = method.__self__
    if not isinstance(text, str):
        return None

    def formatted(*arguments: Any, **named: Any) -> str:
        if method.__name__ == "format_map":
            named, arguments = arguments[0], ()
        return _LimitedFormatter(environment).vformat(str(text), arguments, named)

    return formatted


def _indent(function: Callable[..., Any], allow: Allow) -> Callable[..., Any]:
    def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        allow(len(s) + (s.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
        return function(s, width, first, blank)

    return indent


def _round(function: Callable[..., Any], allow: Allow) -> Callable[..., Any]:
    def round_value(value: Any, precision: int = 0, method: Any = "common") -> Any:
        if abs(precision) > _MAX_WIDTH:
            raise TooCostly(f"it rounds to more than {_MAX_WIDTH} digits")
        return function(value, precision, method)

    return round_value


def _format(function: Callable[..., Any], allow: Allow) -> Callable[..., Any]:
    def format_text(value: Any, *arguments: Any, **named: Any) -> Any:
        _check_format(str(value))
        return function(value, *arguments, **named)

    return format_text


def _tojson(function: Callable[..., Any], allow: Allow) -> Callable[..., Any]:
    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> Any:
        if (indent if isinstance(indent, int) else len(indent or "")) > _MAX_WIDTH or any(
            len(each) > _MAX_WIDTH for each in separators or ()
        ):
            raise TooCostly("it writes JSON with wide indentation")
        return function(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    return tojson


def _int(function: Callable[..., Any], allow: Allow) -> Callable[..., Any]:
    def to_int(value: Any, default: int = 0, base: int = 10) -> Any:
        if isinstance(value, str) and len(value) > _MAX_WIDTH:
            raise TooCostly(f"it reads a number of more than {_MAX_WIDTH} digits")
        return function(value, default, base)

    return to_int


def _replace(function: Callable[..., Any], allow: Allow) -> Callable[..., Any]:
    @jinja2.pass_eval_context
    def replace(context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
        allow(_replaced(str(s), str(old), str(new)))
        return function(context, s, old, new, count)

    return replace


def _join(function: Callable[..., Any], allow: Allow) -> Callable[..., Any]:
    @jinja2.pass_eval_context
    def join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        parts = list(value)
        allow(_joined(str(d), parts))
        return function(context, parts, d, attribute)

    return join


def _trim(function: Callable[..., Any], allow: Allow) -> Callable[..., Any]:
    def trim(value: Any, chars: Any = None) -> Any:
        if chars is not None:
            _compared(str(value), str(chars))
        return function(value, chars)

    return trim


MORE_FILTERS: dict[str, Callable[[Callable[..., Any], Allow], Callable[..., Any]]] = {
    "format": _format,
    "indent": _indent,
    "int": _int,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "tojson": _tojson,
    "trim": _trim,
}
"""Filters that are refused before they make a long text."""
