"""Writes docs/configuration.md and the two commented files of .config/ from the schema, so that they cannot drift from it."""

from pathlib import Path

from llamahome.config.describe import Setting, section_help, sections, settings
from llamahome.config.yamltext import write_value
from llamahome.errors import ConfigError, MachineError, Problem

_INTRODUCTION = """# Configuration

Written from `src/llamahome/config/schema.py` by `llamahome config schema --markdown`; a test fails when the two differ.

A setting comes from the highest of these layers that names it:

1. the default below
2. `.config/training_config.yaml`, then `.config/distributed_config.yaml`
3. `--config FILE`, each in the order typed
4. an environment variable, `LLAMAHOME_TRAINING__EPOCHS=1`
5. a named option, `--epochs 1`
6. `--set training.epochs=1`

Files are YAML 1.2: `5e-5` is a number and `no` is a word. Values in variables and `--set` are read as YAML too; a setting that
takes only text needs no quotes there.

    llamahome config show           every value and where it came from
    llamahome config check          every mistake at once, with file, line and column
    llamahome config explain KEY    one setting
    llamahome config init           writes the two files of .config/, commented
    llamahome config schema         a JSON schema for editors

A mistake is an error even when a higher layer replaces the value. A variable named `LLAMAHOME_` and a section, or `LLAMAHOME_` and a
key, must name a setting.
"""

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
        parts.append(f"## {section}\n\n{section_help(section)}\n\n| key | takes | default | |\n|---|---|---|---|")
        rows = (each for each in settings().values() if each.section == section)
        parts[-1] += "".join(
            f"\n| `{each.name}` | {_cell(_takes(each))} | `{write_value(each.default)}` | {_cell(each.help)} |" for each in rows
        )
        parts[-1] += "\n"
    return "\n".join(parts)


def starter_files() -> dict[str, str]:
    """The files that `llamahome config init` writes and the repository ships: path -> text."""
    distributed = [key for key in settings() if key.startswith("distributed.")]
    return {
        ".config/training_config.yaml": _TRAINING_HEAD + _commented(_TRAINING_KEYS.split()),
        ".config/distributed_config.yaml": _DISTRIBUTED_HEAD + _commented(distributed),
    }


def write_starter_files(folder: Path, *, force: bool) -> None:
    """Write them under `folder`; ConfigError when one is there and not `force`, and then none is written."""
    targets = {folder / path: text for path, text in starter_files().items()}
    there = [path for path in targets if path.exists() or path.is_symlink()]
    if there and not force:
        hint = "llamahome config init --force replaces " + " and ".join(str(path) for path in there)
        raise ConfigError([Problem(code="config.file-exists", message="is there already", where=str(path), hint=hint) for path in there])
    for path, text in targets.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            message = f"cannot be written: {error.strerror}"
            raise MachineError(
                Problem(code="machine.config-not-writable", message=message, where=str(path), hint=f"ls -ld {path.parent}")
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


def _takes(setting: Setting) -> str:
    return setting.shape.describe().removeprefix("one of ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
