"""The layers of settings: YAML files, environment variables, flags and --set; each value is checked where it was written.

Every function returns the valid values in the order in which they were written and appends what is wrong to `problems`, so that one run
shows all mistakes of all layers. A value is checked even if a higher layer replaces it.
"""

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llamahome.config.describe import Setting, nearest, nearest_key, sections, settings, unknown_key, unknown_section
from llamahome.config.validate import validate
from llamahome.config.yamltext import Item, Position, YamlTrouble, excerpt, read_document, read_value, write_value
from llamahome.errors import Problem

PREFIX = "LLAMAHOME_"
STANDARD_FILES = (Path(".config/training_config.yaml"), Path(".config/distributed_config.yaml"))


@dataclass(frozen=True)
class Entry:
    """One value that a layer sets. The origin is "a.yaml:7", "LLAMAHOME_TRAINING__EPOCHS", "--epochs", "--set" or "default"."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class _Location:
    """Where a value is written: in a file, or in a line of its own (a variable, a flag, --set)."""

    origin: str
    where: str
    text: str
    at: Position
    in_file: bool
    write: str
    """What stands before the value: a problem's hint is this and the corrected value."""

    def problem(self, code: str, message: str, hint: str) -> Problem:
        shown = excerpt(self.text, self.at, numbered=self.in_file)
        return Problem(code=code, message=message, where=self.where, excerpt=shown, hint=hint)


def _file_location(path: Path, text: str, at: Position, item: Item) -> _Location:
    return _Location(f"{path}:{item.name_at[0]}", f"{path}:{at[0]}:{at[1]}", text, at, True, f"write {item.name}: ")


def _line_location(origin: str, before: str, value: object) -> _Location:
    return _Location(origin, origin, f"{before}{value}", (1, len(before) + 1), False, before)


def _entry(setting: Setting, value: Any, location: _Location, problems: list[Problem]) -> list[Entry]:
    valid, fault = validate(setting, value)
    if fault is None:
        return [Entry(setting.key, valid, location.origin)]
    hint = location.write + fault.correction if fault.correction else fault.hint
    problems.append(location.problem(fault.code, fault.message, hint))
    return []


def _text_entry(setting: Setting, text: str, location: _Location, problems: list[Problem]) -> list[Entry]:
    """As `_entry` for YAML text. A setting of text needs no quotes: `--set output.name=2026`, `--set "output.dir=runs #1"`."""
    bare = text.strip()
    if setting.is_text and bare.lower() not in ("", "~", "null") and bare[0] not in "'\"":
        return _entry(setting, bare, location, problems)
    try:
        return _entry(setting, read_value(text), location, problems)
    except YamlTrouble as trouble:
        problems.append(location.problem("config.bad-yaml", f"{setting.key}: {trouble.message}", f"llamahome config explain {setting.key}"))
        return []


def standard_files(folder: Path) -> list[Path]:
    """The files below `folder`/.config that exist."""
    return [folder / path for path in STANDARD_FILES if (folder / path).exists()]


def read_text(path: Path, problems: list[Problem]) -> str | None:
    """The text of a settings file, or None and a problem."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        code, message, hint = "config.no-such-file", "no such settings file", _similar_file(path)
    except UnicodeDecodeError as error:
        code, message = "config.not-text", f"not UTF-8 text: byte {error.start + 1} cannot be read"
        name, copy = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
        hint = f"iconv -f WINDOWS-1252 -t UTF-8 {name} > {copy} && mv {copy} {name}"
    except OSError as error:
        hint = _file_in(path) if path.is_dir() else f"ls -ld {shlex.quote(str(path))}"
        code, message = "config.unreadable", f"cannot be read: {error.strerror}"
    problems.append(Problem(code=code, message=message, where=str(path), hint=hint))
    return None


def _file_in(folder: Path) -> str:
    """The settings file in `folder` that was most likely meant."""
    files = sorted(path for path in folder.glob("*.y*ml") if path.suffix in (".yaml", ".yml"))
    return f"--config {shlex.quote(str(files[0]))}" if files else f"--config takes a file, and {folder} holds no .yaml"


def _similar_file(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if other.suffix in (".yaml", ".yml")]
    except OSError:
        names = []
    close = nearest(path.name, names)
    return f"did you mean {path.parent / close}?" if close else "llamahome config init writes two commented files that are always read"


def file_entries(path: Path, problems: list[Problem], *, retired: Collection[tuple[str, str]] = ()) -> list[Entry]:
    """What one YAML file sets. The keys `retired`, as (section, name), are ignored."""
    text = read_text(path, problems)
    if text is None:
        return []
    try:
        document = read_document(text)
    except YamlTrouble as trouble:
        location = _file_location(path, text, trouble.at, Item("", trouble.at, None, trouble.at))
        code = "config.not-a-mapping" if trouble.not_a_mapping else "config.bad-yaml"
        problems.append(location.problem(code, trouble.message, f"correct line {trouble.at[0]}, then llamahome config check {path}"))
        return []
    entries: list[Entry] = []
    location_of = partial(_file_location, path, text)
    section_lines: dict[str, int] = {}
    key_lines: dict[str, int] = {}
    for section in document:
        _check_repeated(section.name, section, section_lines, location_of, problems)
        if section.name not in sections():
            problems.append(location_of(section.name_at, section).problem("config.unknown-section", *unknown_section(section.name)))
        elif isinstance(section.value, tuple):
            for item in section.value:
                key = f"{section.name}.{item.name}"
                _check_repeated(key, item, key_lines, location_of, problems)
                if key in settings():
                    entries += _entry(settings()[key], item.value, location_of(item.value_at, item), problems)
                elif (section.name, item.name) not in retired:
                    location = location_of(item.name_at, item)
                    problems.append(location.problem("config.unknown-key", *unknown_key(key)))
        elif section.value is not None:
            first = next(iter(sections()[section.name].model_fields))
            message = f"{section.name} is a section: expected lines like '{first}: ...' below it; got {section.value!r}"
            hint = f"llamahome config explain {section.name}"
            problems.append(location_of(section.value_at, section).problem("config.not-a-mapping", message, hint))
    return entries


def _check_repeated(
    name: str, item: Item, lines: dict[str, int], location_of: Callable[[Position, Item], _Location], problems: list[Problem]
) -> None:
    """Append a problem if `name` is in `lines`, which holds the line of every name so far; otherwise add it there."""
    here = item.name_at[0]
    if name not in lines:
        lines[name] = here
        return
    hint = f"remove line {lines[name]} or line {here}" if "." in name else f"put both parts under one '{name}:'"
    message = f"{name} is written twice; the first is in line {lines[name]}"
    problems.append(location_of(item.name_at, item).problem("config.duplicate-key", message, hint))


def environment_entries(environment: Mapping[str, str], problems: list[Problem]) -> list[Entry]:
    """What LLAMAHOME_SECTION__KEY variables set. A variable that looks like one but names no setting is a problem."""
    by_variable = {setting.variable: setting for setting in settings().values()}
    entries: list[Entry] = []
    for name in sorted(name for name in environment if name.startswith(PREFIX)):
        if name in by_variable:
            entries += _text_entry(by_variable[name], environment[name], _line_location(name, f"{name}=", environment[name]), problems)
        elif _looks_like_setting(name):
            section, _, key = name.removeprefix(PREFIX).lower().replace("__", "_").partition("_")
            close = by_variable.get(name.upper()) or settings().get(nearest_key(section, key) or nearest_key("", f"{section}_{key}") or "")
            guess = f"; did you mean {close.variable}?" if close else ""
            hint = f'export {close.variable}="${name}" && unset {name}' if close else f"unset {name}"
            problems.append(Problem(code="config.unknown-variable", message=f"names no setting{guess}", where=name, hint=hint))
    return entries


def _looks_like_setting(variable: str) -> bool:
    name = variable.removeprefix(PREFIX).upper()
    names = {setting.name.upper() for setting in settings().values()}
    return "__" in name or name in names or name.split("_")[0] in {section.upper() for section in sections()}


def flag_entries(flags: Mapping[str, tuple[str, Any]], problems: list[Problem]) -> list[Entry]:
    """What named flags set: dotted key -> (flag, value). None is a flag that was not typed."""
    entries: list[Entry] = []
    for key, (flag, value) in flags.items():
        setting, location = settings()[key], _line_location(flag, f"{flag} ", value)
        if isinstance(value, str) and not setting.is_text:
            entries += _text_entry(setting, value, location, problems)
        elif value is not None:
            entries += _entry(setting, str(value) if isinstance(value, Path) else value, location, problems)
    return entries


def assignment_entries(assignments: Sequence[str], problems: list[Problem]) -> list[Entry]:
    """What `--set section.key=value` sets."""
    entries: list[Entry] = []
    for assignment in assignments:
        before, equals, value = assignment.partition("=")
        key = before.strip()
        if key in settings() and equals:
            entries += _text_entry(settings()[key], value, _line_location("--set", f"--set {before}=", value), problems)
            continue
        code = "config.bad-assignment"
        if key in settings():
            message, hint = f"{assignment!r} gives no value", f"--set {key}={write_value(settings()[key].default)}"
        elif key in sections():
            message, hint = f"{key} is a section, not a key", f"llamahome config explain {key}"
        else:
            code, (message, hint) = "config.unknown-key", unknown_key(key)
        problems.append(_line_location("--set", "--set ", assignment).problem(code, message, hint))
    return entries
