"""What settings there are, in words: the type, range, default and help of each key, read from the schema.

config/load.py asks it what was expected, `llamahome config explain` and docs/configuration.md show it: one source for all.
"""

import inspect
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from llamahome.config.schema import Config, Section


@dataclass(frozen=True)
class Shape:
    """What a key takes: some words, a number in a range, text, a list of text, null; any of them may be allowed."""

    words: tuple[str, ...] = ()
    number: Literal["", "whole", "real"] = ""
    bounds: tuple[tuple[str, float], ...] = ()
    text: bool = False
    texts: bool = False
    mapping: bool = False
    null: bool = False
    examples: tuple[str, ...] = ()

    def describe(self) -> str:
        """In words, as it stands after "expected"."""
        parts: list[str] = []
        if self.text:
            parts.append(f"text like {_choice([repr(each) for each in self.examples])}" if self.examples else "text")
        if self.texts:
            parts.append("a list of text")
        if self.mapping:
            parts.append(f"a mapping like {_choice(list(self.examples))}" if self.examples else "a mapping of text to text")
        if self.number:
            parts.append(("a whole number" if self.number == "whole" else "a number") + self._range())
        words = [*self.words, *(["null"] if self.null else [])]
        if parts or len(words) < 3:
            return _choice([*words, *parts] if not self.null else [*self.words, *parts, "null"])
        return "one of " + ", ".join(words)

    def _range(self) -> str:
        bounds = dict(self.bounds)
        upper = f"below {_number(bounds['lt'])}" if "lt" in bounds else _number(bounds["le"]) if "le" in bounds else ""
        if "gt" in bounds:
            return f" above {_number(bounds['gt'])}" + (f" and {upper}" if upper else "")
        if "ge" in bounds:
            return f" from {_number(bounds['ge'])} to {upper}" if upper else f" of at least {_number(bounds['ge'])}"
        return f" {upper}" if upper else ""


@dataclass(frozen=True)
class Setting:
    """One key of the schema."""

    key: str
    section: str
    name: str
    default: Any
    help: str
    shape: Shape
    model: type[Section] = field(repr=False)
    attribute: str = field(repr=False)
    """Of the section; it differs from the name where that is a word of Python's own."""

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"LLAMAHOME_{self.section.upper()}__{self.name.upper()}"

    def of(self, config: Config) -> Any:
        """Its value there."""
        return getattr(getattr(config, self.section), self.attribute)


@cache
def settings() -> dict[str, Setting]:
    """Every setting by its dotted key, in the order of the schema."""
    found = {}
    for section, model in sections().items():
        for attribute, info in model.model_fields.items():
            name = info.alias or attribute
            key, shape = f"{section}.{name}", _shape(info)
            found[key] = Setting(key, section, name, info.default, inspect.cleandoc(info.description or ""), shape, model, attribute)
    return found


@cache
def sections() -> dict[str, type[Section]]:
    """The class of each section by its name."""
    return {name: type(info.default) for name, info in Config.model_fields.items()}


def section_help(section: str) -> str:
    """The sentence that stands below the section's class."""
    return inspect.cleandoc(sections()[section].__doc__ or "")


def nearest(word: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate that was most likely meant, without regard to case, - and _."""
    folded = {candidate.casefold().replace("-", "_"): candidate for candidate in candidates}
    close = get_close_matches(word.casefold().replace("-", "_"), list(folded), n=1, cutoff=cutoff)
    return folded[close[0]] if close else None


def nearest_key(section: str, name: str) -> str | None:
    """The dotted key that was most likely meant by `section.name`, looking in that section first, then everywhere.

    Names that other programs use are found by their parts (num_train_epochs holds epochs) or initials (lr).
    """
    own = {each.name: each.key for each in settings().values() if each.section == section}
    every = {each.name: each.key for each in reversed(settings().values())}
    plain = name.casefold().replace("-", "_")
    for keys, cutoff in ((own, 0.6), (every, 0.85)):
        held = max((each for each in keys if f"_{each}_" in f"_{plain}_"), key=len, default=None)
        initials = next((each for each in keys if "_" in each and "".join(word[0] for word in each.split("_")) == plain), None)
        close = (plain if plain in keys else None) or nearest(plain, keys, cutoff=cutoff) or held or initials
        if close:
            return keys[close]
    return nearest(f"{section}.{plain}", settings(), cutoff=0.8)


def unknown_section(name: str, *, what: str = "section") -> tuple[str, str]:
    """Message and hint for a name at the top level that is no section."""
    section, _, key = name.partition(".")
    close = nearest(section, sections())
    if close and key:
        close = nearest_key(close, key) or close
    close = close or nearest_key(section, key) or nearest_key("", name)
    if close:
        return f"unknown {what} {name}; did you mean {close}?", f"llamahome config explain {close}"
    return f"unknown {what} {name}; sections are {', '.join(sections())}", "llamahome config show"


def unknown_key(section: str, name: str) -> tuple[str, str]:
    """Message and hint for a key that its section does not have."""
    close = nearest_key(section, name)
    if close:
        return f"unknown key {section}.{name}; did you mean {close}?", f"llamahome config explain {close}"
    return f"unknown key {section}.{name}", f"llamahome config explain {section}"


def _shape(info: FieldInfo) -> Shape:
    words: list[str] = []
    number: Literal["", "whole", "real"] = ""
    bounds: list[tuple[str, float]] = []
    text = texts = mapping = null = False
    for part, metadata in _members(info.annotation, info.metadata):
        if get_origin(part) is Literal:
            words += [word for word in get_args(part) if word not in words]
        elif part is bool:
            words += ["true", "false"]
        elif part in (int, float):
            number = "whole" if part is int else "real"
            bounds += [(name, getattr(rule, name)) for rule in metadata for name in ("ge", "gt", "le", "lt") if hasattr(rule, name)]
        elif part is str:
            text = True
        elif get_origin(part) is list:
            texts = True
        elif get_origin(part) is dict:
            mapping = True
        elif part is type(None):
            null = True
        else:
            raise TypeError(f"a setting of type {part!r} has no words yet")
    if "auto" in words:
        words = ["auto", *(word for word in words if word != "auto")]
    return Shape(tuple(words), number, tuple(bounds), text, texts, mapping, null, tuple(str(each) for each in info.examples or ()))


def _members(annotation: Any, metadata: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """The alternatives of a union, each with the rules that hold for it."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member, metadata)
    elif get_origin(annotation) is Annotated:
        inner, *rules = get_args(annotation)
        flat = [each for rule in rules for each in (rule.metadata if isinstance(rule, FieldInfo) else [rule])]
        yield from _members(inner, [*metadata, *flat])
    else:
        yield annotation, list(metadata)


def _choice(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1]


def _number(value: float) -> str:
    if isinstance(value, int) and value > 2**53 and value.bit_count() == 1:
        return f"2**{value.bit_length() - 1}"
    return str(value) if isinstance(value, int) else f"{value:g}"
