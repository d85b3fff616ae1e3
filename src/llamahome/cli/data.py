"""The `data` commands: sample, show and prepare; check is in datacheck.py, stats in datastats.py.

Nothing heavy is imported at the top. `data sample` needs only the standard library unless it measures this machine; `data show` needs a
tokenizer but no torch.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llamahome.cli import datacheck, datastats, options, teach
from llamahome.cli.model_limits import find_tokenizer, fit_settings, prepare_rows
from llamahome.config.objectives import learns_rows
from llamahome.errors import DataError, MachineError, Problem, UsageError
from llamahome.rundir import PROCESSED_DATA, RAW_DATA, as_typed
from llamahome.units import many

if TYPE_CHECKING:
    from rich.console import Console

    from llamahome.config.schema import DataConfig
    from llamahome.data.files.sources import Source
    from llamahome.data.text.tokens import ChatTokenizer
    from llamahome.data.view import Kind, Only, ShownRow

_STYLES: dict["Kind", str] = {"learned": "bold green", "context": "dim", "cut": "strike red", "reference": "cyan"}
_MARKS: dict["Kind", tuple[str, str]] = {"learned": ("[[", "]]"), "context": ("", ""), "cut": ("{{", "}}"), "reference": ("((", "))")}
"""Marks around learned and truncated text and references, used if there is no colour."""
_MEANINGS: dict["Kind", str] = {
    "learned": "learned",
    "context": "context, read but not learned",
    "cut": "cut off by data.max_length",
    "reference": "reference for the reward, not learned",
}


@click.group("data", cls=options.Group)
def data_app() -> None:
    """Rows: write a sample, see which tokens are learned, find what is wrong, measure, tokenize before training."""


data_app.add_command(datacheck.check)
data_app.add_command(datastats.stats)
data_app.add_command(teach.teach)


@data_app.command()
@datacheck.paths
@options.eval_data
@datacheck.tokenizer_model
@options.config_files
@options.assignments
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@options.pass_overrides
def prepare(overrides: options.Overrides, paths: tuple[str, ...], as_json: bool) -> None:
    """Tokenize every row into data/training/processed/, where training finds it; an interrupted preparation continues."""
    loaded = replace(overrides, assignments=[*overrides.assignments, "data.streaming=false"]).load()

    from llamahome.units import show_bytes, show_seconds

    started = time.monotonic()
    prepared = prepare_rows(loaded, list(paths))
    prepared.close()
    seconds, folder = time.monotonic() - started, prepared.folder
    if folder is None:  # they are in memory, which a run can use and nobody else
        hint = f"{shlex.join(['llamahome', 'train', *paths, *overrides.typed()])}   keeps them in memory, or tokenizes while it trains"
        message = "the tokenized rows cannot be written"
        raise MachineError(Problem(code="data.store-unwritable", message=message, where=str(PROCESSED_DATA), hint=hint))
    size = sum(path.stat().st_size for path in folder.iterdir())
    if as_json:
        summary = {"folder": str(folder), "bytes": size, "seconds": round(seconds, 3), "fingerprint": prepared.fingerprint}
        print(json.dumps({**summary, **asdict(prepared.report)}))
        return
    print("\n".join(prepared.report.lines()))
    print(f"{show_bytes(size)} in {folder}, {show_seconds(seconds)}; you may delete it at any time, and the next run makes it again")
    print(f"next: {shlex.join(['llamahome', 'train', *paths, *overrides.typed()])}")


@data_app.command()
@click.argument("path", required=False, type=click.Path(path_type=Path), help="File to write; without a suffix it is a folder.")
@click.option(
    "--rows",
    metavar="COUNT|auto",
    help="How many rows; auto: as many as this machine trains on in about 2.5 minutes, 96 to 400. All of about 5,500 otherwise.",
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def sample(path: Path | None, rows: str | None, force: bool) -> None:
    """Write functions of Python's own library and their docstrings as chats, to train on."""
    from llamahome.data.sample import FILE_NAME, write_sample

    if rows is not None and rows != "auto" and not (rows.isdecimal() and int(rows)):
        message = f"{rows!r} is neither a number of rows nor auto"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--rows", hint="--rows auto"))
    target = path if path is not None else RAW_DATA / FILE_NAME
    if target.is_dir() or not target.suffix:
        target /= FILE_NAME
    if target.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        message = f"the sample is JSON lines, and a file that ends in {target.suffix} would be read as something else"
        hint = f"llamahome data sample {as_typed(target.with_suffix('.jsonl'))}"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where=str(target), hint=hint))
    if target.exists() and not force:
        hint = f"llamahome data sample {as_typed(target)} --force   overwrites it"
        raise UsageError(Problem(code="usage.file-exists", message="the file exists already", where=str(target), hint=hint))
    count = write_sample(target, rows=_affordable_rows() if rows == "auto" else int(rows) if rows else None)
    click.echo(f"{many(count, 'row')} in {target}")


def _affordable_rows() -> int:
    """How many rows suit the speed of this machine; prints how the number was chosen."""
    from llamahome.config.load import load_config
    from llamahome.sample_size import size_sample

    return size_sample(load_config(), say=click.echo).rows


@data_app.command()
@datacheck.paths
@click.option("-n", "--rows", type=click.IntRange(min=1), default=3, help="How many rows, in the order of the file.")
@click.option("--row", "chosen", metavar="ROWS", help="Only these rows, counted from 0: 17, or 3,17,40-44.")
@click.option("--longest", is_flag=True, help="The rows with the most tokens.")
@click.option("--no-target", is_flag=True, help="Rows of which nothing is learned.")
@click.option("--cut", is_flag=True, help="Rows that lose tokens to data.max_length.")
@datacheck.tokenizer_model
@options.config_files
@options.assignments
@click.option("--json", "as_json", is_flag=True, help="One object a line: row, source, tokens with id, text, target.")
@options.pass_overrides
def show(
    overrides: options.Overrides,
    paths: tuple[str, ...],
    rows: int,
    chosen: str | None,
    longest: bool,
    no_target: bool,
    cut: bool,
    as_json: bool,
) -> None:
    """Show rows as tokens: which are learned, which are context, which are cut off."""
    from llamahome.data.files.sources import open_source
    from llamahome.data.files.splits import to_train

    filters = {"--row": chosen is not None, "--longest": longest, "--no-target": no_target, "--cut": cut}
    typed = [name for name, given in filters.items() if given]
    if len(typed) > 1:
        message = f"{' and '.join(typed)} cannot be given together"
        raise UsageError(Problem(code="usage.two-filters", message=message, hint=f"only {typed[0]}, or only {typed[1]}"))
    loaded = overrides.load()
    source = open_source(paths, say=lambda note: click.echo(note, err=True), wanted=to_train(loaded.config.data))
    picked = _row_numbers(chosen, len(source)) if chosen is not None else None

    from llamahome.data.text.tokens import open_tokenizer
    from llamahome.data.view import view

    tokenizer_source = find_tokenizer(loaded.config.model)
    tokenizer = open_tokenizer(tokenizer_source)
    data = fit_settings(loaded, tokenizer_source, tokenizer).config.data
    only: Only | None = "cut" if cut else "no-target" if no_target else None
    if longest:
        numbers: Sequence[int] = datastats.longest_rows(paths, data, tokenizer_source, rows)
    elif picked is not None:
        numbers, rows = picked, len(picked)
    else:
        numbers = range(len(source) if only else min(rows, len(source)))
    learned = learns_rows(loaded.config.training.objective)
    found = view(source, numbers, data, tokenizer, only=only, learned=learned)
    problems = _print_rows(found, limit=rows, as_json=as_json)
    _print_notes(source, data, tokenizer)
    if only and problems:
        unusable = many(len(problems), "row")
        click.echo(f"{unusable} that cannot be used not shown: llamahome data check {shlex.join(paths)}", err=True)
    elif problems:
        raise DataError(problems)


def _row_numbers(text: str, count: int) -> list[int]:
    """The numbers in `3,17,40-44`; raises UsageError if one of them is no row of `count`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            message, hint = f"{part.strip()!r} is neither a row nor a range of rows", "--row 17, or --row 3,17,40-44"
            raise UsageError(Problem(code="usage.bad-choice", message=message, where="--row", hint=hint))
        begin, end = int(first), int(last or first)
        if max(begin, end) >= count:
            message = f"there is no row {max(begin, end)}; the rows are 0 to {count - 1}"
            raise UsageError(Problem(code="usage.no-such-row", message=message, where="--row", hint=f"--row {count - 1} is the last"))
        numbers += range(begin, end + 1)
    return list(dict.fromkeys(numbers))


def _print_rows(found: Iterable["ShownRow | Problem"], *, limit: int, as_json: bool) -> list[Problem]:
    """Print at most `limit` rows; returns the problems of rows that cannot be used."""
    from rich.console import Console

    problems: list[Problem] = []
    console = None if as_json else Console(highlight=False, file=sys.stdout)
    for shown in found:
        if isinstance(shown, Problem):
            problems.append(shown)
            continue
        if console is None:
            click.echo(json.dumps(shown.as_json()))
        else:
            print_row(shown, console)
        limit -= shown.answer != "chosen"  # the rejected answer of the row follows
        if not limit:
            break
    return problems


def _print_notes(source: "Source", data: "DataConfig", tokenizer: "ChatTokenizer") -> None:
    """Print notes about how the chat template writes and ends such rows, on stderr."""
    from llamahome.data.prepare import first_format
    from llamahome.data.text.end_tokens import notes_of

    for note in notes_of(tokenizer, chats=first_format(source, data.format, data.columns).name != "text"):
        click.echo(note, err=True)


def print_row(shown: "ShownRow", console: "Console") -> None:
    """Print the row's text with colours, or with marks if there is no colour, then a legend with counts."""
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    body, counts = Text(), dict.fromkeys(_MEANINGS, 0)
    for kind, text, count in shown.spans():
        counts[kind] += count
        before, after = ("", "") if coloured else _MARKS[kind]
        body.append(before + datacheck.visible(text) + after, style=_STYLES[kind])
    legend = Text(f"{len(shown.ids):,} tokens: ")
    for kind, count in counts.items():
        if count:
            before, after = ("", "") if coloured else _MARKS[kind]
            legend.append(", " if not legend.plain.endswith(": ") else "")
            legend.append(f"{count:,} ").append(f"{before}{_MEANINGS[kind]}{after}", style=_STYLES[kind])
    answer = f", the {shown.answer} answer" if shown.answer else ""
    console.print(Text(f"{shown.row.where}{answer} (--row {shown.row.index})", style="bold"), soft_wrap=True)
    console.print(body, soft_wrap=True)
    console.print(legend, soft_wrap=True)
    console.print()
