"""Options that several commands share, and the group that lists its commands in the order of their definition."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig

Decorator = Callable[[Any], Any]


class Group(click.Group):
    """A group of commands; `click.Group` sorts them by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order in which the commands were added."""
        return list(self.commands)


@dataclass
class Overrides:
    """The settings of one command line: --config files, flags such as --epochs, and --set assignments."""

    files: list[Path] = field(default_factory=list)
    flags: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Dotted key -> (flag, value), as `load_config` takes them."""
    assignments: list[str] = field(default_factory=list)

    def load(self) -> "LoadedConfig":
        """All layers of settings; raises ConfigError with every problem."""
        from llamahome.config.load import load_config

        return load_config(self.files, flags=self.flags, assignments=self.assignments)

    def typed(self) -> list[str]:
        """The options as they can be typed again."""
        words = [word for file in self.files for word in ("--config", str(file))]
        words += [word for flag, value in self.flags.values() for word in (flag, str(value))]
        return words + [word for assignment in self.assignments for word in ("--set", assignment)]


pass_overrides = click.make_pass_decorator(Overrides, ensure=True)


def setting(flag: str, key: str, description: str, *, type: type = str, metavar: str | None = None) -> Decorator:
    """An option that sets the key `key`; the command gets it through `pass_overrides`."""

    def store(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        if value is not None:
            ctx.ensure_object(Overrides).flags[key] = (flag, value)

    return click.option(flag, type=type, metavar=metavar, expose_value=False, callback=store, help=f"{description} [{key}].")


def _extend(name: str) -> Callable[[click.Context, click.Parameter, tuple[Any, ...]], None]:
    """A callback that adds the values of a repeated option to the list `name` of the Overrides."""
    return lambda ctx, _, values: getattr(ctx.ensure_object(Overrides), name).extend(values)


def check_settings(loaded: "LoadedConfig") -> None:
    """Raise ConfigError if settings contradict each other."""
    from llamahome.config.check import check_config
    from llamahome.errors import ConfigError

    if problems := check_config(loaded.config, loaded.origins):
        raise ConfigError(problems)


def show_warnings(loaded: "LoadedConfig") -> None:
    """Write what `train` will say of these settings: those without effect, and those that probably do not do what was meant."""
    from llamahome.config.check import config_warnings

    for warning in config_warnings(loaded.config, loaded.origins):
        note(f"warning: {warning.message}; {warning.hint or 'it has no effect'}")


config_files = click.option(
    "--config",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    expose_value=False,
    callback=_extend("files"),
    help="A settings file above those in .config/; may be given again.",
)
assignments = click.option(
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    expose_value=False,
    callback=_extend("assignments"),
    help="Any setting, as section.key=value; may be given again.",
)
model = setting("--model", "model.name", "Base model: a folder, a name, or a hub id")
from_adapter = setting("--from-adapter", "model.adapter", "Train an adapter further: of a run or a PEFT folder", metavar="RUN|FOLDER")
output = setting("--output", "output.dir", "Folder of this run")
world_size = setting("--world-size", "distributed.world_size", "Processes over all machines", type=int)
num_nodes = setting("--num-nodes", "distributed.num_nodes", "Machines: 2, or at least one and at most two, 1:2", metavar="COUNT")
node_rank = setting("--node-rank", "distributed.node_rank", "Number of this machine", type=int)
master_addr = setting("--master-addr", "distributed.master_addr", "Address of machine 0")
master_port = setting("--master-port", "distributed.master_port", "Port on machine 0", type=int)
epochs = setting("--epochs", "training.epochs", "Passes over the data", type=float)
max_steps = setting("--max-steps", "training.max_steps", "End at this step", type=int)
reward = setting("--reward", "grpo.reward", "The function that rewards answers, for training.objective grpo", metavar="FILE.py:FUNCTION")
method = setting("--method", "training.method", "lora or full")
eval_data = setting("--eval-data", "data.eval_path", "Rows to evaluate on")

debug = click.option("--debug", is_flag=True, help="Show tracebacks and the log of libraries.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def not_options(_context: click.Context, _parameter: click.Parameter, paths: tuple[str, ...]) -> tuple[str, ...]:
    """The callback of arguments that name data: paths after `--` that begin with a dash get a form that can be printed in commands."""
    from llamahome.rundir import not_an_option

    return tuple(map(not_an_option, paths))


DATA_HELP = "Files (JSONL, JSON, CSV, Parquet, text), folders, globs, or org/name on the hub; several are read together."


def note(line: str) -> None:
    """Write a line on stderr at once, beside the results on stdout."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a value as JSON of several lines."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def prints_unicode() -> bool:
    """Whether stdout can show bars and other signs beyond ASCII."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


def together(*decorators: Decorator) -> Decorator:
    """One decorator for several options, shown by --help in this order."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


course = together(config_files, world_size, num_nodes, epochs, max_steps, method, reward, eval_data)
"""What a run is, beside model, folder and --set: shared by the commands that start or plan runs."""
meeting = together(node_rank, master_addr, master_port)
"""Where the machines of a run meet."""


def examples(*commands: str) -> str:
    """Text for `epilog` with one example a line; a backspace keeps click from wrapping the paragraph."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)
