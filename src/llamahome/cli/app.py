"""The command line: its groups of commands, how errors are shown, and the exit status.

Importing this module must stay cheap, because `llamahome --help` answers within 0.3 s: no torch, transformers or pydantic at the top.
"""

import codecs
import errno
import io
import os
import shlex
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click

from llamahome import __version__, signals
from llamahome.cli import (
    chat,
    checkpoint,
    completion,
    config,
    dashboard,
    data,
    doctor,
    evaluate,
    export,
    launch,
    model,
    options,
    plan,
    runs,
    serve,
    sweep,
    train,
    verify_resume,
)
from llamahome.errors import LeftAtOnce, LlamaHomeError, MachineError, Problem, Stopped, UsageError


@click.group(cls=options.Group, context_settings={"show_default": True})
@click.version_option(__version__, prog_name="llamahome", message="%(prog)s %(version)s", help="Show the version.")
@completion.install_option
@completion.show_option
def app() -> None:
    """Fine-tune a language model on your data."""


app.add_command(train.train, "train")
app.add_command(train.train, "train-distributed")
app.add_command(train.train_resume)
app.add_command(evaluate.train_eval)
app.add_command(plan.plan)
app.add_command(sweep.sweep)
app.add_command(chat.chat)
app.add_command(serve.serve)
app.add_command(export.export)
app.add_command(data.data_app)
app.add_command(model.models_app)
app.add_command(runs.runs_app)
app.add_command(dashboard.dashboard)
app.add_command(checkpoint.checkpoint_app, "checkpoint")
app.add_command(verify_resume.verify_resume)
app.add_command(config.config_app)
app.add_command(doctor.doctor)
app.add_command(launch.launch_app)


def main() -> None:
    """Run the command line. Every LlamaHomeError becomes text on stderr and its exit status; other errors keep their traceback."""
    _open_closed_streams()
    completion.complete(app)
    _print_any_text()
    signals.leave_on_signals()
    status = 0
    try:
        with app.make_context("llamahome", sys.argv[1:]) as context:
            app.invoke(context)
        signals.ignore_signals()
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    except LlamaHomeError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _exit_with_error(error)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.UsageError as error:
        _exit_with_usage(error)
    except (KeyboardInterrupt, signals.Left):
        signals.ignore_signals()
        with suppress(OSError):  # a closed terminal
            print("\nleft at once", file=sys.stderr, flush=True)
        os._exit(signals.LEFT)  # after a Ctrl-C inside dataclasses' exec, sys.exit would end Python with SIGINT instead
    except BrokenPipeError:
        _exit_like_a_filter()
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        message = f"the output cannot be written: {error.strerror}"  # stdout's, because errors of run files are LlamaHomeErrors
        _exit_with_error(MachineError(Problem(code="machine.output-lost", message=message, hint="write to a disk that has room")))
    _exit(status)


def _open_closed_streams() -> None:
    """Let what this process was started without (`>&-`, some daemons) read and write nothing; its number is then no file's of a run."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - until the process ends


def _print_any_text() -> None:
    """Let stdout take names of files that are not UTF-8, as their own bytes, and halves of characters, as escapes."""

    def encode(error: UnicodeError) -> tuple[bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        try:
            return error.object[error.start : error.end].encode("utf-8", "surrogateescape"), error.end
        except UnicodeEncodeError:
            return error.object[error.start : error.end].encode("ascii", "backslashreplace"), error.end

    codecs.register_error("llamahome", encode)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower().startswith("utf"):
        sys.stdout.reconfigure(errors="llamahome")


def _exit_like_a_filter() -> NoReturn:
    """The reader of the output, such as `head`, has closed the pipe: end silently by SIGPIPE as `cat` does (a shell shows 141)."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    sys.exit(128 + signal.SIGPIPE)  # if the signal is blocked


def _exit_with_error(error: LlamaHomeError) -> NoReturn:
    signals.ignore_signals()
    level = "stopped" if isinstance(error, Stopped | LeftAtOnce) else "error"
    with suppress(OSError):  # if stderr cannot be written, the exit status still shows the failure
        print("\n".join(problem.render(level=level) for problem in error.problems), file=sys.stderr, flush=True)
    _exit(error.exit_status)


def _exit_with_usage(error: click.UsageError) -> NoReturn:
    """Show a mistake in the command line as one of our own error blocks."""
    message = " ".join(error.format_message().split()).rstrip(".")  # click lists choices in lines of their own
    command = error.ctx.command_path if error.ctx is not None else "llamahome"
    hint = f"{command} --help"
    if isinstance(error, click.NoSuchOption):
        files = (word for word in sys.argv[1:] if word.startswith(error.option_name) and Path(word).exists())
        hint = next((f"{command} {shlex.quote(f'./{file}')}" for file in files), hint)
    problem = Problem(code="usage.command-line", message=message[:1].lower() + message[1:], hint=hint)
    _exit_with_error(UsageError(problem))


def _exit(status: int) -> NoReturn:
    """Exit with `status`. If other threads of a distributed run still run, skip Python's own shutdown (see `threads_linger`)."""
    signals.ignore_signals()
    world = sys.modules.get("llamahome.distributed.world")  # a command that needed no torch has not imported it
    if world is not None and world.threads_linger():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
