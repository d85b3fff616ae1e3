"""Turns files, environment variables, flags and --set into one frozen Config that knows where each value came from.

Layers, low to high: defaults, .config/training_config.yaml, .config/distributed_config.yaml, --config files in order,
LLAMAHOME_SECTION__KEY, named flags, --set. All mistakes of all layers are raised at once as one ConfigError. A run's config.yaml,
which `dump_config` writes, loads again to what was chosen in that run: what it left to `auto` is `auto` again in another one.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.config.describe import settings, unknown_key
from llamahome.config.layers import Entry, assignment_entries, environment_entries, file_entries, flag_entries, read_text, standard_files
from llamahome.config.objectives import FORMAT_OF, LEARNS, WITHOUT_ANSWERS
from llamahome.config.preference import WITH_REFERENCE
from llamahome.config.schema import Config
from llamahome.config.validate import validate
from llamahome.config.yamltext import lines_of, write_value
from llamahome.errors import ConfigError, Problem
from llamahome.redaction import redact

DEFAULT = "default"
_COMMENT = "  # "
_HEADER = "# Every setting of this run and where its value came from."
_SAVED = "saved: "
_AUTO = "auto"
AUTO = f"{_AUTO}: "
"""What the origin of a resolved `auto` begins with; the reason follows. A saved file repeats the value, so that a changed one shows."""
_DERIVED = f"{AUTO}training.objective is "
"""Origin of a value that follows from the objective; it is made anew whenever settings are put together."""
BY_ADAPTER = "the adapter "
"""What the origin of a value begins with that follows from the adapter which is trained further; the path of its folder comes after."""
_RETIRED = (("model", "attention"),)
"""Keys of earlier versions: they stand in the config.yaml of older runs and have no effect any more."""


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
    """Settings from all layers; `folder` holds .config/, and `environment` is os.environ by default.

    `flags` maps dotted keys to (flag, value); a value of None was not typed. Text in flags, variables and assignments is read as YAML.
    Raises ConfigError with every problem of every layer. The rules across keys are in check.py.
    """
    problems: list[Problem] = []
    entries: list[Entry] = []
    for path in standard_files(folder):
        entries += file_entries(path, problems)
    for path in files:
        of_run = (read_text(path, []) or "").startswith(_HEADER)
        entries += _of_run(path, problems) if of_run else file_entries(path, problems)
    entries += environment_entries(os.environ if environment is None else environment, problems)
    entries += flag_entries(flags or {}, problems)
    entries += assignment_entries(assignments, problems)
    return _build(entries, problems)


def with_values(loaded: LoadedConfig, changes: Mapping[str, Any], *, origin: str) -> LoadedConfig:
    """The same settings with some keys replaced; raises ConfigError for an unknown key or a value that the schema refuses."""
    problems: list[Problem] = []
    entries: list[Entry] = []
    for key, value in changes.items():
        if key not in settings():
            message, hint = unknown_key(key)
            problems.append(Problem(code="config.unknown-key", message=message, where=origin, hint=hint))
            continue
        valid, fault = validate(settings()[key], value)
        entries.append(Entry(key, valid, origin))
        if fault:
            problems.append(Problem(code=fault.code, message=fault.message, where=origin, hint=fault.hint))
    return _replace(loaded, entries, problems)


def with_assignments(
    loaded: LoadedConfig, assignments: Sequence[str], *, flags: Mapping[str, tuple[str, Any]] | None = None
) -> LoadedConfig:
    """The same settings with `flags` (as in load_config) and then --set's `section.key=value` on top; ConfigError with all mistakes."""
    problems: list[Problem] = []
    entries = flag_entries(flags or {}, problems) + assignment_entries(assignments, problems)
    return _replace(loaded, entries, problems)


def dump_config(loaded: LoadedConfig) -> str:
    """The settings as YAML, each value with its origin as a comment; loads again to the same Config."""
    lines = [_HEADER]
    section = ""
    for key, setting in settings().items():
        if setting.section != section:
            section = setting.section
            lines.append(f"{section}:")
        origin = "".join(letter if letter.isprintable() else "?" for letter in " ".join(loaded.origins[key].split()))
        value = write_value(_without_secrets(setting.of(loaded.config)))
        if origin.removeprefix(_SAVED).startswith(AUTO):
            origin = origin.replace(AUTO, f"{_AUTO} {value}: ", 1)
        lines.append(f"  {setting.name}: {value}{_COMMENT}{origin}")
    return "\n".join(lines) + "\n"


def _without_secrets(value: Any) -> Any:
    """A value of a setting with *** for a password in an address and for a token. No setting needs one."""
    return redact(value, {}) if isinstance(value, str) else value


def read_saved_config(path: Path) -> LoadedConfig:
    """The config.yaml of a run or checkpoint, without .config files and the environment.

    An origin reads `saved: --epochs`. If the file names none, or names "default" or "auto" for another value, it is `path:line`.
    """
    problems: list[Problem] = []
    recorded = _recorded(path, problems)
    saved = [Entry(entry.key, entry.value, _SAVED + origin if origin else entry.origin) for entry, origin in recorded]
    return _build(saved, problems)


def _of_run(path: Path, problems: list[Problem]) -> Iterator[Entry]:
    """What a run's config.yaml sets for another run: of what was chosen, the origin is its line there; the rest is not chosen."""
    for entry, origin in _recorded(path, problems):
        own_folder = entry.key == "output.dir" and entry.value is not None and _is_of_run(path, Path(entry.value))
        if own_folder or origin.startswith(AUTO):
            yield Entry(entry.key, settings()[entry.key].default, DEFAULT)
        else:
            yield Entry(entry.key, entry.value, entry.origin if not origin or is_chosen(origin) else origin)


def _is_of_run(path: Path, folder: Path) -> bool:
    """Whether a config.yaml is that of the run in `folder` or of a checkpoint of it, or a copy, because a run is in `folder`."""
    return folder.resolve() in path.resolve().parents[:2] or (folder / "run_id").is_file()


def _recorded(path: Path, problems: list[Problem]) -> Iterator[tuple[Entry, str]]:
    """What a run's config.yaml sets, and the origin that it names; "" if it names none, or one that an edited value does not have."""
    entries, lines = file_entries(path, problems, retired=_RETIRED), lines_of(read_text(path, []) or "")
    for entry in entries:
        line = lines[int(entry.origin.rpartition(":")[2]) - 1]
        resolved = f"{_AUTO} {write_value(entry.value)}: "
        _, whole, reason = line.rpartition(resolved)  # first, because a value may hold what begins a comment
        origin = resolved + reason.strip() if whole else line.rpartition(_COMMENT)[2].strip() if _COMMENT in line else ""
        origin = origin.removeprefix(_SAVED)
        edited = origin == DEFAULT and entry.value != settings()[entry.key].default
        edited |= origin.startswith(f"{_AUTO} ") and not origin.startswith(resolved)
        yield entry, "" if edited else origin.replace(resolved, AUTO, 1) if origin.startswith(resolved) else origin


def is_chosen(origin: str) -> bool:
    """Whether a user set the value: it is neither a default nor a resolved `auto`, and no adapter decided it."""
    plain = origin.removeprefix(_SAVED)
    return plain != DEFAULT and not plain.startswith((AUTO, BY_ADAPTER))


def is_saved(origin: str) -> bool:
    """Whether the value is that of a checkpoint, and this command has not set it."""
    return origin.startswith(_SAVED)


def _replace(loaded: LoadedConfig, entries: Sequence[Entry], problems: list[Problem]) -> LoadedConfig:
    current = [Entry(key, settings()[key].of(loaded.config), origin) for key, origin in loaded.origins.items()]
    return _build([*current, *entries], problems)


def _build(entries: Sequence[Entry], problems: list[Problem]) -> LoadedConfig:
    """The defaults with all entries in order on top; raises ConfigError if there are problems."""
    if problems:
        raise ConfigError(problems)
    entries = [entry for entry in entries if not entry.origin.removeprefix(_SAVED).startswith(_DERIVED)]
    values: dict[str, dict[str, Any]] = {setting.section: {} for setting in settings().values()}
    origins = dict.fromkeys(settings(), DEFAULT)
    for entry in entries:
        setting = settings()[entry.key]
        values[setting.section][setting.name] = entry.value
        origins[entry.key] = entry.origin
    objective = values["training"].get("objective", "sft")
    fitting = FORMAT_OF.get(LEARNS.get(objective, "answers")) or WITHOUT_ANSWERS.get(objective)
    if fitting and values["data"].get("format", "auto") == "auto":
        values["data"]["format"], origins["data.format"] = fitting, f"{_DERIVED}{objective}"
    if objective in WITH_REFERENCE and values["data"].get("streaming", "auto") == "auto":
        values["data"]["streaming"], origins["data.streaming"] = False, f"{_DERIVED}{objective}"
    return LoadedConfig(Config.model_validate(values, strict=True), origins)
