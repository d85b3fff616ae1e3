"""`data check` lists everything that is wrong with rows, and writes a repaired copy with --fix.

Findings go to stderr like every other error, or to stdout as JSON lines; the counts go to stdout. Nothing heavy is imported at the top.
"""

import contextlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llamahome.cli import options
from llamahome.cli.model_limits import find_tokenizer, fit_settings, positions_of, warn_of_length
from llamahome.config.objectives import learns_rows
from llamahome.errors import DataError, Problem, UsageError
from llamahome.units import many

if TYPE_CHECKING:
    from llamahome.data.checks.check import Checked, Request
    from llamahome.data.checks.findings import Found
    from llamahome.data.checks.fix import Fixed

tokenizer_model = options.setting("--model", "model.name", "Whose tokenizer and chat template to use")
paths = click.argument("paths", metavar="PATH...", nargs=-1, callback=options.not_options, required=True, help="Files, folders or globs.")
no_quality = click.option("--no-quality", is_flag=True, help="Look neither for near duplicates nor for languages.")
processes = click.option("--processes", type=click.IntRange(min=1), help="Processes that read the rows; by default as many as save time.")


@click.command()
@paths
@options.eval_data
@tokenizer_model
@options.config_files
@options.assignments
@click.option("--no-tokens", is_flag=True, help="Look at the structure alone; needs no model.")
@no_quality
@processes
@click.option("--json", "as_json", is_flag=True, help="Every finding as one object a line.")
@click.option("--fix", type=click.Path(path_type=Path), metavar="OUT", help="Write a cleaned copy, and OUT.changes.jsonl.")
@click.option("--dry-run", is_flag=True, help="With --fix: show each change and write nothing.")
@click.option("--force", is_flag=True, help="Overwrite what --fix writes.")
@options.pass_overrides
def check(
    overrides: options.Overrides,
    paths: tuple[str, ...],
    no_tokens: bool,
    no_quality: bool,
    processes: int | None,
    as_json: bool,
    fix: Path | None,
    dry_run: bool,
    force: bool,
) -> None:
    """Find everything that is wrong with rows; exit status 3 if a training run would refuse them."""
    loaded = overrides.load()
    options.check_settings(loaded)

    from llamahome.data.checks.answer_quality import languages_known
    from llamahome.data.checks.check import Request, check
    from llamahome.data.checks.fix import refuse_output

    if dry_run and fix is None:
        raise UsageError(Problem(code="usage.missing-option", message="--dry-run shows what --fix would write", hint="--fix OUT --dry-run"))
    if fix is not None and not dry_run:
        refuse_output(fix, list(paths), force=force)
    tokenizer = None if no_tokens else find_tokenizer(loaded.config.model)
    if tokenizer is not None:
        loaded = fit_settings(loaded, tokenizer)
    near, languages = not no_quality, languages_known() and not no_quality
    request = Request(
        paths,
        loaded.config.data,
        tokenizer,
        near=near,
        languages=languages,
        processes=processes,
        learned=learns_rows(loaded.config.training.objective),
        positions=positions_of(tokenizer),
    )
    started = time.monotonic()
    with progress_bar() as watch:
        checked = check(request, _print_json if as_json else lambda finding: None, watch=watch)
    if tokenizer is not None:
        warn_of_length(loaded, tokenizer, [side for side in (checked.main, checked.evaluation) if side is not None])
    if not as_json:
        for block in _finding_blocks(checked):
            print(block, file=sys.stderr)
    for line in _summary_lines(checked, time.monotonic() - started):
        click.echo(line, err=as_json)
    if fix is not None:
        readable = checked.main is not None and checked.main.format is not None
        _write_copy(request, fix, readable=readable, force=force, dry_run=dry_run, err=as_json)
    elif not as_json and checked.copy_pays():
        command = shlex.join(["llamahome", *sys.argv[1:], "--fix", _unused_name(paths)])
        print(f"help: {command}   writes a copy: repaired where nothing is guessed, without rows that cannot be used", file=sys.stderr)
    if checked.tally.total("error"):
        raise click.exceptions.Exit(DataError.exit_status)


def _write_copy(request: "Request", out: Path, *, readable: bool, force: bool, dry_run: bool, err: bool) -> None:
    """Write the cleaned copy, or with `dry_run` show each change. The text goes to stderr if `err`, because stdout then holds JSON."""
    from llamahome.data.checks.fix import fix
    from llamahome.data.checks.repair import show_change

    show = (lambda entry: click.echo(visible(show_change(entry)), err=err)) if dry_run else None
    try:
        fixed = fix(request, out, force=force, preview=show)
    except DataError:
        if readable:
            raise
        click.echo(f"{out} is not written: there are no rows of one format", err=err)
        return
    for line in _fixed_lines(fixed, out):
        click.echo(f"would be written: {line}" if dry_run else line, err=err)


def _unused_name(paths: Sequence[str]) -> str:
    """clean.jsonl, or the first of clean-2.jsonl, clean-3.jsonl, ... that does not exist; compressed as the files are."""
    from llamahome.data.files.spool import PACKED

    endings = {Path(path).suffix.lower() for path in paths}
    ending = "".join(endings) if len(endings) == 1 and endings <= PACKED.keys() else ""
    names = (f"clean{f'-{number}' if number > 1 else ''}.jsonl{ending}" for number in itertools.count(1))
    return next(name for name in names if not Path(name).exists())


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, and nothing elsewhere; yields a function of (rows done, all rows)."""
    if not sys.stderr.isatty():
        yield lambda done, rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rows", total=None)
        yield lambda done, rows: progress.update(task, completed=done, total=rows)


def _print_json(finding: "Found") -> None:
    print(json.dumps(finding.as_json(), ensure_ascii=False))


def _finding_blocks(checked: "Checked") -> Iterator[str]:
    """The first findings of each kind, and the number of the others."""
    for kind in checked.tally.kinds():
        shown = checked.tally.first[kind]
        for finding in shown:
            yield visible(finding.problem.render(level=finding.level))
        more = checked.tally.counts[kind] - len(shown)
        if more:
            yield f"and {more:,} more of {kind[1]}; --json prints all"


def _summary_lines(checked: "Checked", seconds: float) -> Iterator[str]:
    for level, code in checked.tally.kinds():
        first = checked.tally.first[level, code][0].problem.where
        yield f"{checked.tally.counts[level, code]:>9,} {level:<8} {code:<28} first: {first or '-'}"
    for name, side in (("", checked.main), (" to evaluate on", checked.evaluation)):
        if side is not None:
            files = many(len(side.source.paths), "file")
            bad = len(side.facts) - int(side.facts.usable.sum())
            yield from (*side.source.notes, *(side.notes if side is checked.main else ()))
            if side.source.ignored:
                yield f"{many(len(side.source.ignored), 'data file')} not read: {', '.join(side.source.ignored[:3])}"
            yield f"{many(len(side.facts), 'row')}{name} in {files}, format {side.format or 'not known'}, {bad:,} cannot be used"
            if side.reason:
                yield f"{side.format}{name}: {side.reason}"
    errors, warnings = checked.tally.total("error"), checked.tally.total("warning")
    yield (
        f"{many(errors, 'error')} and {many(warnings, 'warning')} in {seconds:.1f} s"
        if errors or warnings
        else f"nothing is wrong ({seconds:.1f} s)"
    )
    if checked.unsought:
        yield f"not looked for: {'; '.join(checked.unsought)}"


def _fixed_lines(fixed: "Fixed", out: Path) -> Iterator[str]:
    from llamahome.data.files.kinds import CHANGES

    yield f"{out}: {many(fixed.kept, 'row')}, {fixed.repaired:,} of them repaired; {fixed.dropped:,} left out"
    yield f"{out}{CHANGES}: {many(fixed.changes.total(), 'change')}" + "".join(
        f", {count:,} {code}" for code, count in sorted(fixed.changes.items())
    )


def visible(text: str) -> str:
    """`text` with control characters escaped, so that data cannot control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
