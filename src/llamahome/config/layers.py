"""The layers above the files: environment variables, flags, --set; each value is judged where it was set.

Every function returns the good values in the order in which they were written and adds what is wrong to `problems`, so that one look
shows all mistakes of all layers. A value is judged even when a higher layer replaces it. Files: files.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.config.describe import Setting, nearest_key, sections, settings, unknown_key, unknown_section
from llamahome.config.judge import judge
from llamahome.config.yamltext import YamlTrouble, excerpt, read_value, write_value
from llamahome.errors import Problem

PREFIX = "LLAMAHOME_"


@dataclass(frozen=True)
class Origin:
    """Where a value came from: "default", "a.yaml:7", "LLAMAHOME_TRAINING__EPOCHS", "--epochs", "--set"."""

    text: str


@dataclass(frozen=True)
class Entry:
    """One value that a layer sets."""

    key: str
    value: Any
    origin: Origin


def environment_entries(environment: Mapping[str, str], problems: list[Problem]) -> list[Entry]:
    """What LLAMAHOME_SECTION__KEY variables set. A name that was meant as one but is none is a problem; others are not ours."""
    by_variable = {each.variable: each for each in settings().values()}
    entries: list[Entry] = []
    for name in sorted(each for each in environment if each.startswith(PREFIX)):
        setting = by_variable.get(name)
        if setting:
            line = f"{name}={environment[name]}"
            entries += _one_line(setting, environment[name], (name, line, len(name) + 2), problems)
        elif _meant_as_setting(name):
            section, _, key = name.removeprefix(PREFIX).lower().replace("__", "_").partition("_")
            close = by_variable.get(name.upper()) or settings().get(nearest_key(section, key) or nearest_key("", f"{section}_{key}") or "")
            guess = f"; did you mean {close.variable}?" if close else ""
            hint = f"unset {name}" + (f", export {close.variable}" if close else "")
            problems.append(Problem(code="config.unknown-variable", message=f"names no setting{guess}", where=name, hint=hint))
    return entries


def _meant_as_setting(variable: str) -> bool:
    name = variable.removeprefix(PREFIX)
    names = {each.name.upper() for each in settings().values()}
    return "__" in name or name.upper() in names or name.split("_")[0].upper() in {section.upper() for section in sections()}


def flag_entries(flags: Mapping[str, tuple[str, Any]], problems: list[Problem]) -> list[Entry]:
    """What named flags set: dotted key -> (flag, value). None is a flag that was not typed."""
    entries: list[Entry] = []
    for key, (flag, value) in flags.items():
        if value is None:
            continue
        setting = settings()[key]
        shown = f"{flag} {value}"
        if isinstance(value, str) and not _takes_only_text(setting):
            entries += _one_line(setting, value, (flag, shown, len(flag) + 2), problems)
            continue
        good, fault = judge(setting, str(value) if isinstance(value, Path) else value)
        if fault:
            spot = excerpt(shown, (1, len(flag) + 2), numbered=False)
            hint = f"{flag} {fault.remedy}" if fault.remedy else fault.hint
            problems.append(Problem(code=fault.code, message=fault.message, where=flag, excerpt=spot, hint=hint))
        else:
            entries.append(Entry(key, good, Origin(flag)))
    return entries


def assignment_entries(assignments: Sequence[str], problems: list[Problem]) -> list[Entry]:
    """What `--set section.key=value` sets."""
    entries: list[Entry] = []
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        setting = settings().get(key)
        line = f"--set {text}"
        if setting and equals:
            entries += _one_line(setting, value, ("--set", line, line.index("=") + 2), problems)
            continue
        if setting:
            message, hint = f"{text!r} gives no value", f"--set {key}={write_value(setting.default)}"
        elif key in sections():
            message, hint = f"{key} is a section, not a key", f"llamahome config explain {key}"
        else:
            section, _, name = key.partition(".")
            message, hint = unknown_key(section, name) if section in sections() else unknown_section(key, what="key")
        code = "config.bad-assignment" if setting or key in sections() else "config.unknown-key"
        problems.append(Problem(code=code, message=message, where="--set", excerpt=excerpt(line, (1, 7), numbered=False), hint=hint))
    return entries


def _one_line(setting: Setting, text: str, place: tuple[str, str, int], problems: list[Problem]) -> list[Entry]:
    """Judge a value that stands in a variable, flag or --set; `place` is (origin, the line as typed, column of the value)."""
    origin, line, column = place
    code = "config.bad-yaml"
    try:
        value, code, message, hint = _read(setting, text), "", "", ""
    except YamlTrouble as trouble:
        value, message, hint = None, f"{setting.key}: {trouble.message}", f"llamahome config explain {setting.key}"
    if not code:
        value, fault = judge(setting, value)
        if fault is None:
            return [Entry(setting.key, value, Origin(origin))]
        code, message = fault.code, fault.message
        hint = line[: column - 1] + fault.remedy if fault.remedy else fault.hint
    spot = excerpt(line, (1, column), numbered=False)
    problems.append(Problem(code=code, message=message, where=origin, excerpt=spot, hint=hint))
    return []


def _read(setting: Setting, text: str) -> Any:
    """The YAML value. What takes only text (or null) needs no quotes: `--set output.name=2026`, `--set "output.dir=runs #1"`."""
    bare = text.strip()
    if not _takes_only_text(setting) or bare.lower() in ("", "~", "null") or bare[0] in "'\"":
        return read_value(text)
    return bare


def _takes_only_text(setting: Setting) -> bool:
    return setting.shape.text and not setting.shape.texts
