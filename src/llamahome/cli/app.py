"""The command line as a whole: which groups of commands there are, how errors are shown, and the exit status.

Importing this module must stay cheap: `llamahome --help` answers within 0.3 s, so no torch, no transformers, no pydantic at the top.
"""

import errno
import inspect
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn, cast

import typer

from llamahome import __version__
from llamahome.errors import LeftAtOnce, LlamaHomeError, MachineError, Problem, Stopped, UsageError

_CTRL_C = 130
"""What Typer makes of a Ctrl-C where nothing listens to it: while importing, in a command that only reads."""
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
"""Typer does not show its name for every mistake in the words of a command."""

app = typer.Typer(
    name="llamahome",
    help="Fine-tune a language model on your data.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _register() -> None:
    """Fill the app: one file per group of commands."""
    from llamahome.cli import data, launch, model, plan, system, train, watch

    app.command("train")(train.train)
    app.command("train-distributed")(train.train)
    app.command("train-resume")(train.train_resume)
    app.command("train-eval")(train.train_eval)
    app.command("plan")(plan.plan)
    app.command("chat")(model.chat)
    app.add_typer(data.data_app, name="data")
    app.add_typer(model.models_app, name="models")
    app.add_typer(watch.runs_app, name="runs")
    app.add_typer(system.config_app, name="config")
    app.add_typer(launch.launch_app, name="launch")
    groups = [group.typer_instance for group in app.registered_groups if group.typer_instance is not None]
    for command in [command for each in (app, *groups) for command in each.registered_commands]:
        text = inspect.getdoc(command.callback) or ""
        command.help = text.replace("\n\nExamples:\n", "\n\n\b\nExamples:\n")  # the \b keeps the lines of a paragraph


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"llamahome {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Fine-tune a language model on your data."""


def main() -> None:
    """Run the command line; every LlamaHomeError becomes its blocks on stderr and its exit status, nothing else is caught."""
    debug = "--debug" in sys.argv
    try:
        status = app(prog_name="llamahome", standalone_mode=False) or 0
        sys.stdout.flush()
    except LlamaHomeError as error:
        if debug:
            traceback.print_exc()
        _leave(error)
    except _UsageError as error:
        _leave_with_usage(error)
    except BrokenPipeError:
        _leave_like_a_filter()
    except SystemExit as left:  # what Typer makes of it, with status 1
        if isinstance(left.__context__, BrokenPipeError):
            _leave_like_a_filter()
        raise
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        message = f"the output cannot be written: {error.strerror}"  # of stdout: whatever belongs to a run has its own error
        _leave(MachineError(Problem(code="machine.output-lost", message=message, hint="write to a disk that has room")))
    if status == _CTRL_C:
        print("\nleft at once", file=sys.stderr, flush=True)
        os._exit(_CTRL_C)  # Python would end by SIGINT itself where the Ctrl-C came while it compiled a string, as dataclasses do
    _end(status)


def _leave_like_a_filter() -> NoReturn:
    """Whoever read the output, such as `head`, has enough: end without a word by the signal that ends `cat` (a shell calls it 141)."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    sys.exit(128 + signal.SIGPIPE)  # where the signal is blocked


def _leave(error: LlamaHomeError) -> NoReturn:
    level = "stopped" if isinstance(error, Stopped | LeftAtOnce) else "error"
    with suppress(OSError):  # the exit status tells it even where stderr cannot
        print("\n".join(problem.render(level=level) for problem in error.problems), file=sys.stderr, flush=True)
    _end(error.exit_status)


def _end(status: int) -> NoReturn:
    """Leave with `status`; one of several processes, whose files are all closed, without Python's own end (see threads_linger)."""
    world = sys.modules.get("llamahome.distributed.world")  # nothing that did not need torch imports it now
    if world is not None and world.threads_linger():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _leave_with_usage(error: Any) -> NoReturn:
    """A mistake in the words of a command as one of our blocks; a group of commands without a word shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    message = error.format_message().rstrip(".")
    command = error.ctx.command_path if error.ctx is not None else "llamahome"
    _leave(UsageError(Problem(code="usage.command-line", message=message[:1].lower() + message[1:], hint=f"{command} --help")))


_register()
