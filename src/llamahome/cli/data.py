"""The `data` commands: write the sample rows, and show rows as the tokens that are learned; more in datacheck.py, dataprepare.py.

Nothing heavy is imported at the top; `data sample` needs only the standard library, unless it is to measure this machine, and `data show` a
tokenizer but no torch.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamahome.cli import datacheck, dataprepare
from llamahome.cli.modelfit import fitted, tokenizer_of
from llamahome.errors import DataError, Problem, UsageError
from llamahome.rundir import RAW_DATA
from llamahome.units import many

if TYPE_CHECKING:
    from rich.console import Console

    from llamahome.config.schema import DataConfig
    from llamahome.data.files.sources import Source
    from llamahome.data.text.tokens import ChatTokenizer
    from llamahome.data.view import Kind, Only, ShownRow

data_app = typer.Typer(
    name="data",
    help="Rows: write a sample, see which tokens are learned, find what is wrong, measure, tokenize before training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app.command()(datacheck.check)
data_app.command()(datacheck.stats)
data_app.command()(dataprepare.prepare)

_FILTERS = ("--row", "--longest", "--no-target", "--cut")
_STYLES: dict["Kind", str] = {"learned": "bold green", "context": "dim", "cut": "strike red"}
_MARKS: dict["Kind", tuple[str, str]] = {"learned": ("[[", "]]"), "context": ("", ""), "cut": ("{{", "}}")}
"""Around learned and cut text where there is no colour."""
_MEANINGS: dict["Kind", str] = {"learned": "learned", "context": "context, read but not learned", "cut": "cut off by data.max_length"}


@data_app.command()
def sample(
    path: Annotated[Path | None, typer.Argument(help="File to write; without a suffix it is a folder.", metavar="[PATH]")] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            help="How many rows; auto: as many as this machine trains on in about 2.5 minutes, 96 to 400. All of about 5,500 otherwise.",
            metavar="COUNT|auto",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
) -> None:
    """Write functions of Python's own library and their docstrings as chats, to train on."""
    from llamahome.data.sample import FILE_NAME, write_sample

    if rows is not None and rows != "auto" and not (rows.isdecimal() and int(rows)):
        message = f"{rows!r} is neither a number of rows nor auto"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--rows", hint="--rows auto"))
    target = path if path is not None else RAW_DATA / FILE_NAME
    if target.is_dir() or not target.suffix:
        target /= FILE_NAME
    if target.exists() and not force:
        hint = f"llamahome data sample '{target}' --force   overwrites it"
        raise UsageError(Problem(code="usage.file-exists", message="the file exists already", where=str(target), hint=hint))
    count = write_sample(target, rows=_affordable() if rows == "auto" else int(rows) if rows else None)
    typer.echo(f"{many(count, 'row')} in {target}")


def _affordable() -> int:
    """Rows that suit the speed of this machine; says how they were found."""
    from llamahome.config.load import load_config
    from llamahome.samplesize import size_sample

    return size_sample(load_config(), say=typer.echo).rows


@data_app.command()
def show(
    path: Annotated[str, typer.Argument(help="A file (JSONL, JSON, CSV, Parquet, text), a folder or a glob.")],
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows, in the order of the file.")] = 3,
    row: Annotated[int | None, typer.Option("--row", min=0, help="Only this row, counted from 0.")] = None,
    longest: Annotated[bool, typer.Option("--longest", help="The rows with the most tokens.")] = False,
    no_target: Annotated[bool, typer.Option("--no-target", help="Rows of which nothing is learned.")] = False,
    cut: Annotated[bool, typer.Option("--cut", help="Rows that lose tokens to data.max_length.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="Whose tokenizer and chat template to use.")] = None,
    config: Annotated[list[Path] | None, typer.Option("--config", help="A YAML file; repeatable.", metavar="FILE")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="One setting; repeatable.", metavar="KEY=VALUE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line: row, source, tokens with id, text, target.")] = False,
) -> None:
    """Show rows as tokens: which are learned, which are context, which are cut off."""
    from llamahome.config.load import load_config
    from llamahome.data.files.sources import open_source
    from llamahome.data.files.splits import to_train

    chosen = [name for name, given in zip(_FILTERS, (row is not None, longest, no_target, cut), strict=True) if given]
    if len(chosen) > 1:
        message = f"{' and '.join(chosen)} cannot be given together"
        raise UsageError(Problem(code="usage.two-filters", message=message, hint=f"only {chosen[0]}, or only {chosen[1]}"))
    loaded = load_config(config or (), assignments=assignments or (), flags={"model.name": ("--model", model)} if model else None)
    source = open_source(path, say=lambda note: typer.echo(note, err=True), wanted=to_train(loaded.config.data))
    if row is not None and row >= len(source):
        message = f"there is no row {row}; the rows are 0 to {len(source) - 1}"
        raise UsageError(Problem(code="usage.no-such-row", message=message, where="--row", hint=f"--row {len(source) - 1} is the last"))

    from llamahome.data.text.tokens import open_tokenizer
    from llamahome.data.view import view

    place = tokenizer_of(loaded.config.model)
    tokenizer = open_tokenizer(place)
    settings = fitted(loaded, place, tokenizer).config
    only: Only | None = "cut" if cut else "no-target" if no_target else None
    if longest:
        numbers: Sequence[int] = datacheck.longest_rows(path, settings.data, place, rows)
    elif row is not None:
        numbers = [row]
    else:
        numbers = range(len(source) if only else min(rows, len(source)))
    problems: list[Problem] = []
    console = None if as_json else _console()
    left = rows
    for shown in view(source, numbers, settings.data, tokenizer, only=only):
        if isinstance(shown, Problem):
            problems.append(shown)
            continue
        if console is None:
            typer.echo(json.dumps(shown.as_json()))
        else:
            print_row(shown, console)
        left -= 1
        if not left:
            break
    _tell_ends(source, settings.data, tokenizer)
    if only and problems:
        bad = many(len(problems), "row")
        typer.echo(f"{bad} that cannot be used not shown: llamahome data check {shlex.quote(path)}", err=True)
    elif problems:
        raise DataError(problems)


def _tell_ends(source: "Source", data: "DataConfig", tokenizer: "ChatTokenizer") -> None:
    """What should be known of how such rows are written and end, on stderr."""
    from llamahome.data.prepare import first_format
    from llamahome.data.text.ends import notes_of

    for note in notes_of(tokenizer, chats=first_format(source, data.format, data.columns).name != "text"):
        typer.echo(note, err=True)


def print_row(shown: "ShownRow", console: "Console") -> None:
    """The row's text with colours, or with marks where there is no colour; then the legend with counts."""
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    body, counts = Text(), dict.fromkeys(_MEANINGS, 0)
    for kind, text, count in shown.stretches():
        counts[kind] += count
        before, after = ("", "") if coloured else _MARKS[kind]
        body.append(before + datacheck.visible(text) + after, style=_STYLES[kind])
    legend = Text(f"{len(shown.ids):,} tokens: ")
    for kind, count in counts.items():
        if count:
            before, after = ("", "") if coloured else _MARKS[kind]
            legend.append(", " if not legend.plain.endswith(": ") else "")
            legend.append(f"{count:,} ").append(f"{before}{_MEANINGS[kind]}{after}", style=_STYLES[kind])
    console.print(Text(f"row {shown.row.index}, {shown.row.where}", style="bold"), soft_wrap=True)
    console.print(body, soft_wrap=True)
    console.print(legend, soft_wrap=True)
    console.print()


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, file=sys.stdout)
