"""Jinja for chat templates of unknown authors: sandboxed, and bounded in time, in memory and in the length of every value.

The environment has transformers' filters, globals and tags. Whatever can repeat or grow is counted while a template is rendered: loops,
calls, operators, filters, outputs, and what lists, tuples and dicts hold. After so many of them the processor time and the memory of this
process are looked at, so a chat takes at most some seconds. What would grow in one call is refused before it is done (growing_calls.py).
Short values are not counted: the loops that make many of them are. The time is that of this thread's processor, so a busy or suspended
machine refuses nothing. Cost: measured in docs/log.md.
"""

import functools
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llamahome.data.text.growing_calls import (
    MORE_FILTERS,
    REMOVED_FILTERS,
    REMOVED_METHODS,
    TooCostly,
    check_call,
    check_operator,
    limited_format,
)

MAX_SOURCE = 1 << 18
"""Characters of a template. Those of well-known models have up to 30,000."""
MAX_SECONDS = 2.0
"""Processor time for one chat. A chat of 1,000 turns takes some milliseconds."""
MAX_SIZE = 1 << 22
"""Characters of a text, or values in a list, that a template may always make; four times the size of the chat where that is more."""
MAX_MEMORY = 1 << 30
"""Bytes by which this process may grow while one chat is rendered."""
_LOOK_AFTER_COUNTS, _LOOK_AFTER_SIZE = 64, 1 << 20
"""How often time and memory are looked at. A look takes some 2 microseconds."""
_SHORT_TEXT, _SHORT_LIST = 4096, 64
"""Characters and values that are not counted one by one."""
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_COUNTED_EACH, _COUNTED, _COUNTED_DEEP = "counted each", "counted", "counted deep"
"""Names of filters that a template cannot write, because they have a space."""


class _Rendering(threading.local):
    """What one thread has counted while it renders one chat."""

    arguments: Any = None
    began = 0.0
    memory = 0
    counts = 0
    size = 0
    looked = 0

    def begin(self, arguments: Any) -> None:
        self.arguments, self.began, self.memory = arguments, time.thread_time(), _peak_memory()
        self.counts = self.size = self.looked = 0

    def count(self, size: int = 0) -> None:
        """Count one operation that made or read `size` characters or values. Raises TooCostly."""
        self.counts += 1
        self.size += size
        if not self.counts % _LOOK_AFTER_COUNTS or self.size - self.looked > _LOOK_AFTER_SIZE:
            self.look()

    def look(self) -> None:
        """Raise TooCostly after too much time or memory."""
        self.looked = self.size
        if time.thread_time() - self.began > MAX_SECONDS:
            raise TooCostly(f"it takes more than {MAX_SECONDS:.0f} s for one chat")
        if _peak_memory() - self.memory > MAX_MEMORY:
            raise TooCostly(f"it takes more than {MAX_MEMORY >> 30} GiB of memory for one chat")

    def largest(self) -> int:
        """How many characters or values a value may have; reads the whole chat."""
        return max(MAX_SIZE, 4 * _weight(self.arguments, sys.maxsize))

    def allow(self, size: int) -> None:
        """Raise TooCostly if a value of `size` characters or values is too large."""
        if size > MAX_SIZE and size > self.largest():
            raise TooCostly(f"it makes a text or a list with more than {MAX_SIZE:,} characters or values")

    def made(self, value: Any) -> Any:
        """Count a value and everything in it; returns it."""
        if isinstance(value, str):
            size = len(value)
            if size <= _SHORT_TEXT:
                return value
        elif isinstance(value, list | tuple | dict | jinja2.utils.Namespace):
            size = _weight(value, MAX_SIZE)
            if size > MAX_SIZE:
                size = _weight(value, self.largest())
        else:
            return value
        self.allow(size)
        self.count(size)
        return value


_rendering = _Rendering()


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def _weight(value: Any, limit: int) -> int:
    """Characters and values in a value, at every depth and as often as it would be written; counting ends above `limit`."""
    weight, waiting = 0, [value]
    while waiting and weight <= limit:
        each = waiting.pop()
        weight += 1
        if isinstance(each, str):
            weight += len(each)
        elif isinstance(each, dict):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, jinja2.utils.Namespace):
            waiting.append(object.__getattribute__(each, "_Namespace__attrs"))
    return weight


def _each_counted(values: Any) -> Any:
    _rendering.count()
    return values if isinstance(values, list | tuple | range) and len(values) <= _SHORT_LIST else _counting(values)


def _counting(values: Any) -> Iterator[Any]:
    for number, value in enumerate(values):
        if not number % _SHORT_LIST:
            _rendering.look()
        yield value


def _read(value: Any) -> Any:
    """Count what an operation reads; what is in it was counted when it was made."""
    if isinstance(value, str | list | tuple) and len(value) > _SHORT_LIST:
        _rendering.count(len(value))
    return value


class _CountEverything(NodeTransformer):
    """Puts the counting filters around what loops go over, and around lists, tuples, dicts and slices."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED_EACH)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _COUNTED) if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        loaded = getattr(node, "ctx", "load") == "load"
        plain = all(isinstance(item, nodes.Const) for item in node.items)
        return _filtered(node, _COUNTED_DEEP) if loaded and not plain else node

    visit_List = visit_Tuple = visit_Dict = _literal


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counted_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        _read(arguments[at])
        return _rendering.made(function(*arguments, **named))

    return counted


def _counted_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*arguments: Any) -> Any:
        for each in arguments:
            _read(each)
        return function(*arguments)

    return counted


class _BoundedTemplate(jinja2.Template):
    @classmethod
    def _from_namespace(cls, environment: Any, namespace: Any, globals: Any) -> Any:
        namespace["concat"], namespace["str_join"] = _joined, _joined_values
        return super()._from_namespace(environment, namespace, globals)


def _joined(parts: Any) -> str:
    whole, size = [], 0
    for part in parts:
        size += len(part)
        _rendering.allow(size)
        whole.append(part)
    return "".join(whole)


def _joined_values(values: Any) -> str:
    return str(_rendering.made(_joined(map(str, values))))


def _output(value: Any) -> str:
    text = str(value)
    if len(text) > _SHORT_TEXT:
        _rendering.count(len(text))
    return text


def _is_small(value: Any) -> bool:
    kind = type(value)
    return (kind is str and len(value) <= _SHORT_TEXT) or (kind is int and -_SMALL < value < _SMALL)


_SMALL = 1 << 31
_SMALL_OPERATORS = frozenset("+-")
_SLOW_TESTS = frozenset({"in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">="})
"""Those that compare everything in a list."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of a compiled template of transformers, with bounds."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    template_class = _BoundedTemplate
    concat = staticmethod(_joined)

    def __init__(self, like: jinja2.Environment) -> None:
        extensions = [type(extension) for extension in like.extensions.values()]
        super().__init__(trim_blocks=like.trim_blocks, lstrip_blocks=like.lstrip_blocks, extensions=extensions, finalize=_output)
        self.globals = {name: value for name, value in like.globals.items() if name != "lipsum"}
        filters = {name: function for name, function in like.filters.items() if name not in REMOVED_FILTERS}
        filters |= {name: make(filters[name], _rendering.allow) for name, make in MORE_FILTERS.items()}
        self.filters = {name: _counted_filter(function) for name, function in filters.items()}
        self.filters |= {_COUNTED_EACH: _each_counted, _COUNTED: _read, _COUNTED_DEEP: _rendering.made}
        tests: dict[str, Any] = like.tests
        self.tests = {**tests, **{name: _counted_test(tests[name]) for name in _SLOW_TESTS}}
        self.begin = _rendering.begin

    def compile_text(self, text: str) -> jinja2.Template:
        """The template of a text. Raises TooCostly, and what jinja2 and Python raise for text that is none."""
        if len(text) > MAX_SOURCE:
            raise TooCostly(f"it has {len(text):,} characters, and at most {MAX_SOURCE:,} are allowed")
        self.begin(())
        return self.from_string(text)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _CountEverything().visit(tree).set_environment(self)  # type: ignore[no-any-return]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use this attribute."""
        return attr not in REMOVED_METHODS and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse the attribute at once; jinja2 would refuse only what is done with it."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe.")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Calculate; what would be too large is refused before."""
        if operator in _SMALL_OPERATORS and _is_small(left) and _is_small(right):
            return left + right if operator == "+" else left - right
        _rendering.allow(check_operator(operator, left, right))
        return _rendering.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *arguments: Any, **named: Any) -> Any:
        """Call a method, a macro or a function; what would be too large is refused before."""
        _rendering.count(check_call(obj, arguments, named, _rendering.allow) if arguments else 0)
        return _rendering.made(super().call(context, obj, *arguments, **named))

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format`, without wide fields."""
        return limited_format(self, value)


def bounded_compiler(compiler: Callable[[str], Any]) -> Callable[[str], Any]:
    """Like transformers' compiler of templates, but with bounds; made at the first call."""
    made: list[BoundedEnvironment] = []

    def compile_text(text: str) -> jinja2.Template:
        if not made:
            made.append(BoundedEnvironment(compiler("").environment))
        return made[0].compile_text(text)

    return compile_text
