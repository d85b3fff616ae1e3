"""Generates docs/configuration.md and the files of .config/ from the schema: two commented YAML files and their JSON schema."""

import json
from pathlib import Path

from llamahome.config.describe import json_schema, section_help, sections, settings
from llamahome.config.yamltext import write_value
from llamahome.errors import ConfigError, MachineError, Problem

_INTRODUCTION = """# Configuration

Generated from `src/llamahome/config/schema.py` by `llamahome config schema --markdown`; a test fails if the two differ.

A setting comes from the highest of these layers that names it:

1. the default below
2. `.config/training_config.yaml`, then `.config/distributed_config.yaml`
3. `--config FILE`, each in the order typed
4. an environment variable, `LLAMAHOME_TRAINING__EPOCHS=1`
5. a named option, `--epochs 1`
6. `--set training.epochs=1`

Files are YAML 1.2: `5e-5` is a number and `no` is a word. Values in variables and `--set` are read as YAML too, but a setting that
takes only text needs no quotes there.

    llamahome config show           every value and where it came from
    llamahome config check          every mistake at once, with file, line and column
    llamahome config explain KEY    one setting
    llamahome config init           writes the two files of .config/, commented, and their JSON schema
    llamahome config schema         prints the JSON schema

Editors with a YAML language server complete and check keys by the first line of those files; put it into your own files too:

    # yaml-language-server: $schema=.config/schema.json

A mistake is an error even if a higher layer replaces the value. A variable whose name starts with `LLAMAHOME_` and a section or a key
must name a setting.
"""

_SCHEMA_LINE = "# yaml-language-server: $schema=./schema.json\n"
_TRAINING_HEAD = """# How to train. Every "auto" is replaced by a value before training, and the run says which and why.
# A line like "#key: value" is a setting at its default; remove the "#" to change it.
# Every setting there is: docs/configuration.md or `llamahome config show`. Check this file: `llamahome config check`.
"""
_DISTRIBUTED_HEAD = """# Processes and machines. Nothing is needed here to train on one machine.
# A line like "#key: value" is a setting at its default; remove the "#" to change it.
"""
_TRAINING_KEYS = (
    "training.method training.batch_size training.epochs training.max_steps training.learning_rate training.schedule training.warmup "
    "training.gradient_checkpointing training.mixed_precision training.seed lora.rank lora.alpha lora.dropout lora.target_modules "
    "data.max_length data.eval_split checkpoint.every"
)


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section in sections():
        rows = [f"## {section}\n\n{section_help(section)}\n\n| key | takes | default | |\n|---|---|---|---|"]
        for setting in settings().values():
            if setting.section == section:
                takes = _cell(setting.describe_values().removeprefix("one of "))
                rows.append(f"| `{setting.name}` | {takes} | `{write_value(setting.default)}` | {_cell(setting.help)} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def starter_files() -> dict[str, str]:
    """The files that `llamahome config init` writes and the repository ships, as path -> text."""
    distributed = [key for key in settings() if key.startswith("distributed.")]
    return {
        ".config/training_config.yaml": _SCHEMA_LINE + _TRAINING_HEAD + _commented(_TRAINING_KEYS.split()),
        ".config/distributed_config.yaml": _SCHEMA_LINE + _DISTRIBUTED_HEAD + _commented(distributed),
        ".config/schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
    }


def write_starter_files(folder: Path, *, force: bool) -> None:
    """Write them below `folder`. Raises ConfigError, and writes none, if one exists and not `force`."""
    targets = {folder / path: text for path, text in starter_files().items()}
    existing = [path for path in targets if path.exists() or path.is_symlink()]
    if existing and not force:
        names, message = ", ".join(map(str, existing)), f"{'these files exist' if len(existing) > 1 else 'the file exists'} already"
        hint = "llamahome config init --force   writes all of them anew"
        raise ConfigError(Problem(code="config.file-exists", message=message, where=names, hint=hint))
    for path, text in targets.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            message = f"cannot be written: {error.strerror}"
            raise MachineError(
                Problem(code="machine.config-not-writable", message=message, where=str(path), hint="cd to a folder that you may write to")
            ) from error


def _commented(keys: list[str]) -> str:
    lines: list[str] = []
    section = ""
    for setting in (settings()[key] for key in keys):
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section}:"]
        lines += [f"  # {line}" for line in setting.help.splitlines()]
        lines.append(f"  #{setting.name}: {write_value(setting.default)}")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
