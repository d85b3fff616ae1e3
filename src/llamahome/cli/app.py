"""The command line as a whole: which groups of commands there are, how errors are shown, and the exit status.

Importing this module must stay cheap: `llamahome --help` answers within 0.3 s, so no torch, no transformers, no pydantic at the top.
"""

import sys

import typer

from llamahome import __version__
from llamahome.errors import LeftAtOnce, LlamaHomeError, Stopped

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
    from llamahome.cli import data, model, system, train, watch

    app.command("train")(train.train)
    app.command("train-distributed")(train.train)
    app.command("train-resume")(train.train_resume)
    app.command("train-eval")(train.train_eval)
    app.command("chat")(model.chat)
    app.add_typer(data.data_app, name="data")
    app.add_typer(model.models_app, name="models")
    app.add_typer(watch.runs_app, name="runs")
    app.add_typer(system.config_app, name="config")


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
        app()
    except LlamaHomeError as error:
        if debug:
            raise
        level = "stopped" if isinstance(error, Stopped | LeftAtOnce) else "error"
        print("\n".join(problem.render(level=level) for problem in error.problems), file=sys.stderr)
        sys.exit(error.exit_status)
    except SystemExit as ended:
        if ended.code == 130:  # Ctrl-C where nothing listens to it: while importing, in a command that reads
            print("\nleft at once", file=sys.stderr)
        raise


_register()
