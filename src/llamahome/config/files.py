"""The lowest layers: settings in YAML files. Every mistake of a file is found in one reading, in the order of its lines."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from llamahome.config.describe import nearest, sections, settings, unknown_key, unknown_section
from llamahome.config.judge import judge
from llamahome.config.layers import Entry, Origin
from llamahome.config.yamltext import Item, Place, YamlTrouble, excerpt, read_document
from llamahome.errors import Problem

STANDARD_FILES = (Path(".config/training_config.yaml"), Path(".config/distributed_config.yaml"))


@dataclass
class _Sheet:
    """One file being read, and what is wrong with it so far."""

    path: Path
    text: str
    retired: Collection[tuple[str, str]] = ()
    found: list[tuple[Place, Problem]] = field(default_factory=list)

    def report(self, at: Place, *, code: str, message: str, hint: str) -> None:
        where = f"{self.path}:{at[0]}:{at[1]}"
        self.found.append((at, Problem(code=code, message=message, where=where, excerpt=excerpt(self.text, at), hint=hint)))

    def problems(self) -> list[Problem]:
        return [problem for _, problem in sorted(self.found, key=lambda pair: pair[0])]


def standard_files(folder: Path) -> list[Path]:
    """The files under `folder`/.config that are there."""
    return [folder / path for path in STANDARD_FILES if (folder / path).exists()]


def read_text(path: Path, problems: list[Problem]) -> str | None:
    """The text of a settings file, or None and a problem."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        code, message, hint = "config.no-such-file", "no such settings file", _other_file(path)
    except UnicodeDecodeError as error:
        code, message = "config.not-text", f"not UTF-8 text: byte {error.start + 1} cannot be read"
        hint = f"iconv -f WINDOWS-1252 -t UTF-8 {path} > {path}.utf8"
    except OSError as error:
        code, message = "config.unreadable", f"cannot be read: {error.strerror}"
        hint = f"ls -ld {path}"
    problems.append(Problem(code=code, message=message, where=str(path), hint=hint))
    return None


def _other_file(path: Path) -> str:
    try:
        beside = [each.name for each in path.parent.iterdir() if each.suffix in (".yaml", ".yml")]
    except OSError:
        beside = []
    close = nearest(path.name, beside)
    return f"did you mean {path.parent / close}?" if close else "llamahome config init writes two commented files that are always read"


def file_entries(path: Path, problems: list[Problem], *, retired: Collection[tuple[str, str]] = ()) -> list[Entry]:
    """What one YAML file sets; keys that are `retired` are passed over."""
    text = read_text(path, problems)
    if text is None:
        return []
    sheet = _Sheet(path, text, retired)
    entries = _sheet_entries(sheet)
    problems += sheet.problems()
    return entries


def _sheet_entries(sheet: _Sheet) -> list[Entry]:
    try:
        document = read_document(sheet.text)
    except YamlTrouble as trouble:
        code = "config.not-a-mapping" if trouble.not_a_mapping else "config.bad-yaml"
        sheet.report(
            trouble.at, code=code, message=trouble.message, hint=f"mend line {trouble.at[0]}, then llamahome config check {sheet.path}"
        )
        return []
    _report_repeated(sheet, document, "")
    members: dict[str, list[Item]] = {}
    for item in document:
        if item.name not in sections():
            message, hint = unknown_section(item.name)
            sheet.report(item.name_at, code="config.unknown-section", message=message, hint=hint)
        elif isinstance(item.value, tuple):
            members.setdefault(item.name, []).extend(item.value)
        elif item.value is not None:
            first = next(iter(sections()[item.name].model_fields))
            message = f"{item.name} is a section: expected lines like '{first}: ...' below it; got {item.value!r}"
            sheet.report(item.value_at, code="config.not-a-mapping", message=message, hint=f"llamahome config explain {item.name}")
    for section, items in members.items():
        _report_repeated(sheet, items, section + ".")
    return [entry for section, items in members.items() for item in items if (entry := _entry(sheet, section, item))]


def _entry(sheet: _Sheet, section: str, item: Item) -> Entry | None:
    setting = settings().get(f"{section}.{item.name}")
    if setting is None and (section, item.name) in sheet.retired:
        return None
    if setting is None:
        message, hint = unknown_key(section, item.name)
        sheet.report(item.name_at, code="config.unknown-key", message=message, hint=hint)
        return None
    value, fault = judge(setting, item.value)
    if fault:
        hint = f"write {item.name}: {fault.remedy}" if fault.remedy else fault.hint
        sheet.report(item.value_at, code=fault.code, message=fault.message, hint=hint)
        return None
    return Entry(setting.key, value, Origin(f"{sheet.path}:{item.name_at[0]}"))


def _report_repeated(sheet: _Sheet, items: Iterable[Item], prefix: str) -> None:
    first: dict[str, int] = {}
    for item in items:
        if item.name in first:
            message = f"{prefix}{item.name} is written twice; the first is in line {first[item.name]}"
            hint = f"remove line {first[item.name]} or line {item.name_at[0]}" if prefix else f"put both parts under one '{item.name}:'"
            sheet.report(item.name_at, code="config.duplicate-key", message=message, hint=hint)
        first.setdefault(item.name, item.name_at[0])
