"""Reads YAML 1.2 into plain values with the position of each, and writes plain values as YAML.

A position is (line, column), both from 1. Only text, numbers, true, false, null, lists and mappings are built; other tags are refused,
dates stay text, and a list that contains itself is refused. The writer quotes text that another YAML reader could take for something else.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

Position = tuple[int, int]

_TAG = "tag:yaml.org,2002:"
_BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./-]+)*")
_RESERVED_WORDS = frozenset(("true", "false", "null", "yes", "no", "on", "off", "y", "n"))
_EXCERPT_WIDTH = 110


@dataclass(frozen=True)
class Item:
    """One `name: value` of a mapping. The value of a section is a tuple of Items."""

    name: str
    name_at: Position
    value: Any
    value_at: Position


class YamlTrouble(Exception):
    """The text is not YAML, or not a mapping; `at` says where."""

    def __init__(self, message: str, at: Position, *, not_a_mapping: bool = False) -> None:
        super().__init__(message)
        self.message, self.at, self.not_a_mapping = message, at, not_a_mapping


def read_document(text: str) -> tuple[Item, ...]:
    """The sections at the top level, each with its Items; () for an empty document. A repeated name is listed each time."""
    yaml, node = _compose(text)
    if node is None or node.tag == _TAG + "null":
        return ()
    if not isinstance(node, MappingNode):
        raise YamlTrouble(f"expected sections like 'training:'; got {_kind(node)}", _at(node), not_a_mapping=True)
    return _items(yaml, node, sections=True)


def read_value(text: str) -> Any:
    """One value, as after `key: ` in a file; empty text is null."""
    yaml, node = _compose(text)
    return None if node is None else _value(yaml, node, {})


def _compose(text: str) -> tuple[YAML, Node | None]:
    yaml = YAML(typ="safe", pure=True)
    try:
        return yaml, yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        at = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise YamlTrouble(_rephrased(error), at) from error
    except ReaderError as error:
        before = _BREAKS.split(text[: error.position])
        raise YamlTrouble("a character that YAML does not allow", (len(before), len(before[-1]) + 1)) from error
    except YAMLError as error:
        raise YamlTrouble(str(error).splitlines()[0], (1, 1)) from error
    except RecursionError as error:
        raise YamlTrouble("brackets nested too deeply", (1, 1)) from error


def _rephrased(error: MarkedYAMLError) -> str:
    """The common mistakes in plain words, and the parser's own words for the others."""
    problem = str(error.problem or error.context or "cannot be read")
    if "'\\t'" in problem:
        return "a tab where only spaces are allowed"
    if "another document" in problem:
        return "a second document (---) in one file"
    if "stream end" in problem or "end of stream" in problem:
        return "a bracket or quotation mark is never closed"
    if "mapping values are not allowed" in problem:
        return "a second ':' in one line; quote the value if it belongs to it"
    return problem


def _items(yaml: YAML, node: MappingNode, *, sections: bool) -> tuple[Item, ...]:
    items = []
    for name, value in node.value:
        text = name.value if isinstance(name, ScalarNode) else _kind(name)
        is_section = sections and isinstance(value, MappingNode)
        built = _items(yaml, value, sections=False) if is_section else _value(yaml, value, {})
        absent = isinstance(value, ScalarNode) and not value.value and value.style is None
        items.append(Item(str(text), _at(name), built, _at(name) if absent else _at(value)))
    return tuple(items)


def _value(yaml: YAML, node: Node, built: dict[int, Any]) -> Any:
    """The plain value of a node. `built` keeps lists and mappings by node, so that aliases cost nothing and cycles are found."""
    if isinstance(node, ScalarNode):
        return _scalar(yaml, node)
    if node.tag not in (_TAG + "seq", _TAG + "map"):
        raise _bad_tag(node)
    if id(node) not in built:
        built[id(node)] = None
        try:
            if isinstance(node, SequenceNode):
                built[id(node)] = [_value(yaml, part, built) for part in node.value]
            else:
                built[id(node)] = {str(name.value): _value(yaml, value, built) for name, value in node.value}
        except RecursionError as error:
            raise YamlTrouble("brackets nested too deeply", _at(node)) from error
    elif built[id(node)] is None:
        raise YamlTrouble("a value that contains itself", _at(node))
    return built[id(node)]


def _scalar(yaml: YAML, node: ScalarNode) -> Any:
    """Text, a number, true, false or null; dates stay text."""
    tag = str(node.tag).removeprefix(_TAG)
    if tag in ("str", "timestamp", "value", "merge") or (tag in ("int", "float") and "_" in node.value):
        return node.value  # 1_000 is a number in YAML 1.1 and text in 1.2
    if tag not in ("null", "bool", "int", "float"):
        raise _bad_tag(node)
    try:
        return yaml.constructor.construct_object(node)
    except (ValueError, LookupError) as error:
        raise YamlTrouble(f"{node.value[:40]!r} is not {tag}", _at(node)) from error


def _bad_tag(node: Node) -> YamlTrouble:
    return YamlTrouble(f"the tag {str(node.tag).replace(_TAG, '!!')} is not allowed in settings", _at(node))


def _kind(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, MappingNode) else f"the text {str(node.value)[:40]!r}"


def _at(node: Node) -> Position:
    return node.start_mark.line + 1, node.start_mark.column + 1


def lines_of(text: str) -> list[str]:
    """The lines of `text` as YAML counts them."""
    return _BREAKS.split(text)


def excerpt(text: str, at: Position, *, numbered: bool = True) -> str:
    """The line of `text` at a position, with a caret below the column; a long line is cut to the part around it."""
    lines = lines_of(text)
    line = lines[at[0] - 1].replace("\t", " ") if at[0] <= len(lines) else ""
    column = min(at[1] - 1, len(line))
    start = max(0, column - _EXCERPT_WIDTH * 2 // 3) if len(line) > _EXCERPT_WIDTH else 0
    shown = "".join(letter if letter.isprintable() else "?" for letter in line[start : start + _EXCERPT_WIDTH])
    pad = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in shown[: column - start])
    gutter = f"{at[0]} | " if numbered else ""
    below = " " * (len(gutter) - 2) + "| " if numbered else ""
    return f"{gutter}{shown}\n{below}{' ' * pad}^"


def write_value(value: Any) -> str:
    """A value as one line of YAML that reads back as the same value, here and in readers of YAML 1.1."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else _float(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(write_value(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_value(name)}: {write_value(part)}" for name, part in value.items()) + "}"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED_WORDS:
        return text
    return '"' + "".join(_escape(letter) for letter in text) + '"'


def _float(value: float) -> str:
    """`5.0e-05` instead of `5e-05`, which readers of YAML 1.1 take for text."""
    mantissa, mark, power = repr(value).partition("e")
    return f"{mantissa}.0{mark}{power}" if mark and "." not in mantissa else mantissa + mark + power


def _escape(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
