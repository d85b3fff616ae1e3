"""Reads YAML 1.2 text into plain values with the place of each, and writes plain values as YAML.

Places are (line, column), both from 1. Nothing but text, numbers, true, false, null, lists and mappings is built: no tags, no
objects, no dates, and a list that contains itself is refused. The writer quotes what another reader could take for something else.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

Place = tuple[int, int]

_TAG = "tag:yaml.org,2002:"
_BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./-]+)*")
_WORDS_WITH_A_MEANING = frozenset(("true", "false", "null", "yes", "no", "on", "off", "y", "n"))
_EXCERPT_WIDTH = 110


@dataclass(frozen=True)
class Item:
    """One `name: value` of a mapping; a mapping inside a document's top level is a tuple of Items."""

    name: str
    name_at: Place
    value: Any
    value_at: Place


class YamlTrouble(Exception):
    """The text is not YAML, or not a mapping; says where."""

    def __init__(self, message: str, at: Place, *, not_a_mapping: bool = False) -> None:
        super().__init__(message)
        self.message, self.at, self.not_a_mapping = message, at, not_a_mapping


def read_document(text: str) -> tuple[Item, ...]:
    """The top-level mapping, its mappings as Items in turn; () for an empty document. Repeated names are all listed."""
    yaml, node = _compose(text)
    if node is None or _is_null(node):
        return ()
    if not isinstance(node, MappingNode):
        raise YamlTrouble(f"expected sections like 'training:'; got {_kind(node)}", _at(node), not_a_mapping=True)
    return _items(yaml, node, nested=True)


def read_value(text: str) -> Any:
    """One value, as after `key: ` in a file; empty text is null."""
    yaml, node = _compose(text)
    return None if node is None else _plain(yaml, node, {})


def _compose(text: str) -> tuple[YAML, Node | None]:
    yaml = YAML(typ="safe", pure=True)
    try:
        return yaml, yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        at = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise YamlTrouble(_own_words(error), at) from error
    except ReaderError as error:
        before = _BREAKS.split(text[: error.position])
        raise YamlTrouble("a character that YAML does not allow", (len(before), len(before[-1]) + 1)) from error
    except YAMLError as error:
        raise YamlTrouble(str(error).splitlines()[0], (1, 1)) from error
    except RecursionError as error:
        raise YamlTrouble("brackets nested too deeply", (1, 1)) from error


def _own_words(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "cannot be read")
    if "'\\t'" in problem:
        return "a tab where only spaces may stand"
    if "another document" in problem:
        return "a second document (---) in one file"
    if "stream end" in problem or "end of stream" in problem:
        return "a bracket or quotation mark is never closed"
    if "mapping values are not allowed" in problem:
        return "a second ':' in one line; quote the value when it belongs to it"
    return problem


def _items(yaml: YAML, node: MappingNode, *, nested: bool) -> tuple[Item, ...]:
    found = []
    for name, value in node.value:
        text = name.value if isinstance(name, ScalarNode) else _kind(name)
        inside = nested and isinstance(value, MappingNode)
        plain = _items(yaml, value, nested=False) if inside else _plain(yaml, value, {})
        absent = isinstance(value, ScalarNode) and not value.value and value.style is None
        found.append(Item(str(text), _at(name), plain, _at(name) if absent else _at(value)))
    return tuple(found)


def _plain(yaml: YAML, node: Node, built: dict[int, Any]) -> Any:
    """The value of a node; `built` remembers lists and mappings, so that aliases cost nothing and cycles are seen."""
    if isinstance(node, ScalarNode):
        return _scalar(yaml, node)
    if node.tag not in (_TAG + "seq", _TAG + "map"):
        raise YamlTrouble(f"the tag {_short_tag(node)} is not allowed in settings", _at(node))
    if id(node) not in built:
        built[id(node)] = None
        try:
            if isinstance(node, SequenceNode):
                built[id(node)] = [_plain(yaml, part, built) for part in node.value]
            else:
                built[id(node)] = {str(name.value): _plain(yaml, value, built) for name, value in node.value}
        except RecursionError as error:
            raise YamlTrouble("brackets nested too deeply", _at(node)) from error
    elif built[id(node)] is None:
        raise YamlTrouble("a value that contains itself", _at(node))
    return built[id(node)]


def _scalar(yaml: YAML, node: ScalarNode) -> Any:
    tag = node.tag.removeprefix(_TAG) if isinstance(node.tag, str) else str(node.tag)
    if tag in ("str", "timestamp", "value", "merge"):
        return node.value
    if tag == "null":
        return None
    if tag in ("bool", "int", "float"):
        try:
            return yaml.constructor.construct_object(node)
        except (ValueError, LookupError) as error:
            raise YamlTrouble(f"{node.value[:40]!r} is not {tag}", _at(node)) from error
    raise YamlTrouble(f"the tag {_short_tag(node)} is not allowed in settings", _at(node))


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == _TAG + "null"


def _kind(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, MappingNode) else f"the text {str(node.value)[:40]!r}"


def _short_tag(node: Node) -> str:
    return str(node.tag).replace(_TAG, "!!")


def _at(node: Node) -> Place:
    return node.start_mark.line + 1, node.start_mark.column + 1


def lines_of(text: str) -> list[str]:
    """The lines as YAML counts them."""
    return _BREAKS.split(text)


def excerpt(text: str, at: Place, *, numbered: bool = True) -> str:
    """The line of `text` at a place with a caret below the column; long lines are cut around it."""
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
    """A value in one line of YAML that reads back as the same value, here and with readers of YAML 1.1."""
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
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS_WITH_A_MEANING:
        return text
    return '"' + "".join(_escape(letter) for letter in text) + '"'


def _float(value: float) -> str:
    """`5.0e-05`, not `5e-05`: readers of YAML 1.1 take the latter for text."""
    mantissa, mark, power = repr(value).partition("e")
    return f"{mantissa}.0{mark}{power}" if mark and "." not in mantissa else mantissa + mark + power


def _escape(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
