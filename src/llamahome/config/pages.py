"""Writes docs/configuration.md and the two commented files of .config/ from the schema, so that they cannot drift from it."""

from llamahome.config.describe import Setting, section_help, sections, settings
from llamahome.config.yamltext import write_value

_INTRODUCTION = """# Configuration

Written from `src/llamahome/config/schema.py` by `llamahome config schema --markdown`; a test fails when the two differ.

A setting comes from the highest of these layers that names it:

1. the default below
2. `.config/training_config.yaml`, then `.config/distributed_config.yaml`
3. `--config FILE`, each in the order typed
4. an environment variable, `LLAMAHOME_TRAINING__EPOCHS=1`
5. a named option, `--epochs 1`
6. `--set training.epochs=1`

Files are YAML 1.2: `5e-5` is a number and `no` is a word. Values in variables and `--set` are read as YAML too, and a setting that takes only
text needs no quotes there. `llamahome config show` prints every value with where it came from, `llamahome config check` finds every mistake at
once, `llamahome config explain KEY` shows one setting, `llamahome config init` writes the two files of `.config/`.
`llamahome config schema` prints a JSON schema for editors.

A mistake is an error even when a higher layer replaces the value. A variable that begins with `LLAMAHOME_` and the name of a section, or that is
`LLAMAHOME_` and the name of a key, must name a setting.
"""

_TRAINING_HEAD = """# How to train. These values suit LoRA on small data, up to a few thousand rows.
# A line that starts with "# key:" is a setting at its default; remove the "# " to change it.
# Every setting there is: docs/configuration.md or `llamahome config show`. Check this file: `llamahome config check`.
"""
_DISTRIBUTED_HEAD = """# Processes and machines. Nothing is needed here to train on one machine.
# A line that starts with "# key:" is a setting at its default; remove the "# " to change it.
"""
_SMALL_DATA = {"training.batch_size": 8, "training.epochs": 1}
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


def _commented(keys: list[str]) -> str:
    lines: list[str] = []
    section = ""
    for setting in (settings()[key] for key in keys):
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section}:"]
        lines += [f"  # {line}" for line in setting.help.splitlines()]
        if setting.key in _SMALL_DATA:
            lines.append(f"  {setting.name}: {write_value(_SMALL_DATA[setting.key])}  # default {write_value(setting.default)}")
        else:
            lines.append(f"  # {setting.name}: {write_value(setting.default)}")
    return "\n".join(lines) + "\n"


def _takes(setting: Setting) -> str:
    return setting.shape.describe().removeprefix("one of ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
