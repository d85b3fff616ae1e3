"""Turns files, environment variables, flags and --set into one frozen Config that knows where each value came from.

Layers, low to high: defaults, .config/training_config.yaml, .config/distributed_config.yaml, --config files in order,
LLAMAHOME_SECTION__KEY, named flags, --set. All mistakes of all layers are raised at once as one ConfigError. A run's config.yaml,
which `dump_config` writes, loads again to the same Config.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.config.describe import settings, unknown_key
from llamahome.config.files import file_entries, read_text, standard_files
from llamahome.config.judge import judge
from llamahome.config.layers import Entry, Origin, assignment_entries, environment_entries, flag_entries
from llamahome.config.schema import Config
from llamahome.config.yamltext import lines_of, write_value
from llamahome.errors import ConfigError, Problem

__all__ = ["LoadedConfig", "Origin", "dump_config", "load_config", "read_saved_config", "with_assignments", "with_values"]

DEFAULT = "default"
_COMMENT = "  # "
_SAVED = "saved: "
_RETIRED = (("model", "attention"),)
"""Keys of earlier versions, which stand in the config.yaml of older runs and decide nothing any more."""


@dataclass(frozen=True)
class LoadedConfig:
    """The settings, and for every dotted key where its value came from."""

    config: Config
    origins: dict[str, str]


def load_config(
    files: Sequence[Path] = (),
    *,
    flags: Mapping[str, tuple[str, Any]] | None = None,
    assignments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    folder: Path = Path(),
) -> LoadedConfig:
    """Settings from all layers; `folder` holds .config/, `environment` is os.environ when not given.

    `flags` maps dotted keys to (flag as typed, value); a value of None was not typed. Text in flags, variables and assignments is read
    as YAML. Raises ConfigError with every problem of every layer. Rules across keys: check.py.
    """
    problems: list[Problem] = []
    entries: list[Entry] = []
    for path in [*standard_files(folder), *files]:
        entries += file_entries(path, problems)
    entries += environment_entries(os.environ if environment is None else environment, problems)
    entries += flag_entries(flags or {}, problems)
    entries += assignment_entries(assignments, problems)
    if problems:
        raise ConfigError(problems)
    return _build(entries)


def with_values(loaded: LoadedConfig, changes: Mapping[str, Any], *, origin: str) -> LoadedConfig:
    """The same settings with some keys replaced; raises ConfigError for an unknown key or a value that the schema refuses."""
    problems: list[Problem] = []
    values = {key: setting.of(loaded.config) for key, setting in settings().items()}
    for key, value in changes.items():
        if key not in settings():
            section, _, name = key.partition(".")
            message, hint = unknown_key(section, name)
            problems.append(Problem(code="config.unknown-key", message=message, where=origin, hint=hint))
            continue
        values[key], fault = judge(settings()[key], value)
        if fault:
            problems.append(Problem(code=fault.code, message=fault.message, where=origin, hint=fault.hint))
    if problems:
        raise ConfigError(problems)
    origins = {**loaded.origins, **dict.fromkeys(changes, origin)}
    return _build([Entry(key, value, Origin(origins[key])) for key, value in values.items()])


def with_assignments(
    loaded: LoadedConfig, assignments: Sequence[str], *, flags: Mapping[str, tuple[str, Any]] | None = None
) -> LoadedConfig:
    """The same settings with `flags` (as in load_config) and then --set's `section.key=value` on top; ConfigError with all mistakes."""
    problems: list[Problem] = []
    entries = flag_entries(flags or {}, problems) + assignment_entries(assignments, problems)
    if problems:
        raise ConfigError(problems)
    before = [Entry(key, settings()[key].of(loaded.config), Origin(origin)) for key, origin in loaded.origins.items()]
    return _build([*before, *entries])


def dump_config(loaded: LoadedConfig) -> str:
    """The settings as YAML, each value with its origin as a comment; loads again to the same Config."""
    lines = ["# Every setting of this run and where its value came from."]
    section = ""
    for key, setting in settings().items():
        if setting.section != section:
            section = setting.section
            lines.append(f"{section}:")
        origin = "".join(letter if letter.isprintable() else "?" for letter in " ".join(loaded.origins[key].split()))
        lines.append(f"  {setting.name}: {write_value(setting.of(loaded.config))}{_COMMENT}{origin}")
    return "\n".join(lines) + "\n"


def read_saved_config(path: Path) -> LoadedConfig:
    """The config.yaml of a run or checkpoint alone: no .config files, no environment.

    An origin reads `saved: --epochs`; where the file tells none, or tells "default" for a value that is not, it is `path:line`.
    """
    problems: list[Problem] = []
    text = read_text(path, [])
    entries = file_entries(path, problems, retired=_RETIRED)
    if problems or text is None:
        raise ConfigError(problems)
    lines = lines_of(text)
    kept = []
    for entry in entries:
        line = lines[int(entry.origin.text.rpartition(":")[2]) - 1]
        recorded = line.rpartition(_COMMENT)[2].strip().removeprefix(_SAVED) if _COMMENT in line else ""
        edited = recorded == DEFAULT and entry.value != settings()[entry.key].default
        kept.append(Entry(entry.key, entry.value, Origin(_SAVED + recorded) if recorded and not edited else entry.origin))
    return _build(kept)


def is_chosen(origin: str) -> bool:
    """Whether somebody set the value: not a default, not a resolved `auto`."""
    plain = origin.removeprefix(_SAVED)
    return plain != DEFAULT and not plain.startswith("auto")


def _build(entries: Sequence[Entry]) -> LoadedConfig:
    values: dict[str, dict[str, Any]] = {setting.section: {} for setting in settings().values()}
    origins = dict.fromkeys(settings(), DEFAULT)
    for entry in entries:
        setting = settings()[entry.key]
        values[setting.section][setting.name] = entry.value
        origins[entry.key] = entry.origin.text
    return LoadedConfig(Config.model_validate(values, strict=True), origins)
