"""The settings as data: the key, type, range, default and help of every setting, read from the schema.

Error messages, `llamahome config explain`, docs/configuration.md and the JSON schema for editors all come from here.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

from llamahome.config.schema import Config
from llamahome.config.section import Section


@dataclass(frozen=True)
class Setting:
    """One key of the schema."""

    key: str
    section: str
    name: str
    default: Any
    help: str
    is_text: bool
    """It takes only text (or null), which therefore needs no quotes on the command line."""
    model: type[Section] = field(repr=False)
    attribute: str = field(repr=False)
    """The field of the section's class; it differs from the name if that is a keyword of Python."""

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"LLAMAHOME_{self.section.upper()}__{self.name.upper()}"

    def of(self, config: Config) -> Any:
        """Its value in `config`."""
        return getattr(getattr(config, self.section), self.attribute)

    @property
    def alternatives(self) -> list[dict[str, Any]]:
        """The JSON schema of each type that it takes."""
        schema = json_schema()["$defs"][self.model.__name__]["properties"][self.name]
        return list(schema.get("anyOf", [schema]))

    @property
    def words(self) -> list[str]:
        """The fixed words that it takes, `auto` first."""
        words = [word for schema in self.alternatives for word in _fixed_words(schema)]
        return sorted(dict.fromkeys(words), key=lambda word: word != "auto")

    @property
    def kinds(self) -> set[str]:
        """The JSON types that it takes besides the fixed words: string, integer, number, array, object, null."""
        return {schema["type"] for schema in self.alternatives if not _fixed_words(schema)}

    def describe_values(self) -> str:
        """What it takes, in the words that follow "expected"."""
        parts = [_describe(schema) for schema in self.alternatives if not _fixed_words(schema) and schema["type"] != "null"]
        values = [*self.words, *parts, *(["null"] if "null" in self.kinds else [])]
        return _choice(values) if parts or len(values) < 3 else "one of " + ", ".join(values)


@cache
def settings() -> dict[str, Setting]:
    """Every setting by its dotted key, in the order of the schema."""
    by_key = {}
    for section, model in sections().items():
        for attribute, info in model.model_fields.items():
            name = info.alias or attribute
            help_, is_text = inspect.cleandoc(info.description or ""), info.annotation in (str, str | None)
            by_key[f"{section}.{name}"] = Setting(f"{section}.{name}", section, name, info.default, help_, is_text, model, attribute)
    return by_key


@cache
def sections() -> dict[str, type[Section]]:
    """The class of each section by its name."""
    return {name: type(info.default) for name, info in Config.model_fields.items()}


@cache
def json_schema() -> dict[str, Any]:
    """The JSON schema of a settings file; the caller must not change it."""
    schema = Config.model_json_schema()
    for section in schema["properties"].values():
        section["anyOf"] = [{"$ref": section.pop("$ref")}, {"type": "null"}]  # a line `training:` alone is an empty section
        del section["default"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def section_help(section: str) -> str:
    """The docstring of the section's class."""
    return inspect.cleandoc(sections()[section].__doc__ or "")


def nearest(word: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate that was most likely meant; case, - and _ do not matter."""
    folded = {candidate.casefold().replace("-", "_"): candidate for candidate in candidates}
    close = get_close_matches(word.casefold().replace("-", "_"), list(folded), n=1, cutoff=cutoff)
    return folded[close[0]] if close else None


def nearest_key(section: str, name: str) -> str | None:
    """The dotted key that was most likely meant by `section.name`, from that section first and then from all.

    The names of other programs are found by a key that they contain (num_train_epochs contains epochs) or by initials (lr).
    """
    plain = name.casefold().replace("-", "_")
    in_section = {setting.name: setting.key for setting in settings().values() if setting.section == section}
    everywhere = {setting.name: setting.key for setting in reversed(settings().values())}
    for keys, cutoff in ((in_section, 0.6), (everywhere, 0.85)):
        contained = max((key for key in keys if f"_{key}_" in f"_{plain}_"), key=len, default=None)
        by_initials = next((key for key in keys if "_" in key and "".join(word[0] for word in key.split("_")) == plain), None)
        close = (plain if plain in keys else None) or nearest(plain, keys, cutoff=cutoff) or contained or by_initials
        if close:
            return keys[close]
    return nearest(f"{section}.{plain}", settings(), cutoff=0.8)


def unknown_section(name: str, *, what: str = "section") -> tuple[str, str]:
    """Message and hint for a name at the top level that is no section."""
    section, _, key = name.partition(".")
    close = nearest(section, sections(), cutoff=0.6 if key else 0.85)
    if not key and not close:
        names = {setting.name: setting.key for setting in reversed(settings().values())} | {name: name for name in sections()}
        close = nearest_key("", section) or names.get(nearest(section, names) or "")
    if close and key:
        close = nearest_key(close, key) or close
    close = close or nearest_key(section, key)
    if close:
        return f"unknown {what} {name}; did you mean {close}?", f"llamahome config explain {close}"
    return f"unknown {what} {name}; sections are {', '.join(sections())}", "llamahome config show"


def unknown_key(key: str) -> tuple[str, str]:
    """Message and hint for a dotted key that does not exist."""
    section, _, name = key.partition(".")
    if section not in sections():
        return unknown_section(key, what="key")
    close = nearest_key(section, name)
    if close:
        return f"unknown key {key}; did you mean {close}?", f"llamahome config explain {close}"
    return f"unknown key {key}", f"llamahome config explain {section}"


def _fixed_words(schema: dict[str, Any]) -> list[str]:
    if schema.get("type") == "boolean":
        return ["true", "false"]
    return [schema["const"]] if "const" in schema else schema.get("enum", [])


def _describe(schema: dict[str, Any]) -> str:
    """One type in words, like "a whole number of at least 1"."""
    examples = schema.get("examples", [])
    match schema["type"]:
        case "string":
            return f"text like {_choice([repr(example) for example in examples])}" if examples else "text"
        case "array":
            return "a list of text"
        case "object":
            values = schema.get("additionalProperties")
            of = _describe(values) if isinstance(values, dict) and "type" in values else "text"
            return f"a mapping like {_choice(examples)}" if examples else f"a mapping of text to {of}"
        case kind:
            return ("a whole number" if kind == "integer" else "a number") + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    bounds = {name: _number(schema[name]) for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum") if name in schema}
    upper = f"below {bounds['exclusiveMaximum']}" if "exclusiveMaximum" in bounds else bounds.get("maximum")
    if "exclusiveMinimum" in bounds:
        return f" above {bounds['exclusiveMinimum']}" + (f" and {'' if upper.startswith('below') else 'at most '}{upper}" if upper else "")
    return f" from {bounds['minimum']} to {upper}" if upper else f" of at least {bounds['minimum']}"


def _choice(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1]


def _number(value: float) -> str:
    if isinstance(value, int) and value > 2**53 and value.bit_count() == 1:
        return f"2**{value.bit_length() - 1}"
    return str(value) if isinstance(value, int) else f"{value:g}"
