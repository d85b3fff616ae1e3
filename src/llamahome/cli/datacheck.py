"""`data check` and `data stats`: what is wrong with rows, and what they come to in figures.

Findings go to stderr as every other error does, or to stdout as JSON lines; the counts go to stdout. Nothing heavy is imported at the top.
"""

import contextlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamahome.cli.modelfit import fitted, positions_of, tokenizer_of, warn_of_length
from llamahome.errors import ConfigError, DataError, Problem, UsageError
from llamahome.units import many

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig
    from llamahome.config.schema import DataConfig
    from llamahome.data.checks.check import Checked, Request
    from llamahome.data.checks.compare import Side
    from llamahome.data.checks.findings import Found
    from llamahome.data.checks.fix import Fixed
    from llamahome.data.checks.stats import Stats
    from llamahome.data.text.place import TokenizerPlace

Paths = Annotated[list[str], typer.Argument(help="Files, folders or globs.", metavar="PATH...")]
Model = Annotated[str | None, typer.Option("--model", help="Whose tokenizer and chat template to use.")]
ConfigFiles = Annotated[list[Path] | None, typer.Option("--config", help="A YAML file; repeatable.", metavar="FILE")]
Assignments = Annotated[list[str] | None, typer.Option("--set", help="One setting; repeatable.", metavar="KEY=VALUE")]
NoQuality = Annotated[bool, typer.Option("--no-quality", help="Do not use the extra `quality`: near duplicates and languages.")]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="Processes that read the rows; as many as pay otherwise.")]

_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def check(
    paths: Paths,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Rows to evaluate on [data.eval_path].")] = None,
    model: Model = None,
    config: ConfigFiles = None,
    assignments: Assignments = None,
    no_tokens: Annotated[bool, typer.Option("--no-tokens", help="Look at the structure alone; needs no model.")] = False,
    no_quality: NoQuality = False,
    processes: Processes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every finding as one object a line.")] = False,
    fix: Annotated[Path | None, typer.Option("--fix", help="Write a cleaned copy, and OUT.changes.jsonl.", metavar="OUT")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --fix: show each change and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what --fix writes.")] = False,
) -> None:
    """Find everything that is wrong with rows; exit status 3 when a training run would refuse them."""
    loaded = _settings(config, assignments, {"model.name": ("--model", model), "data.eval_path": ("--eval-data", eval_data)})

    from llamahome.data.checks.check import Request
    from llamahome.data.checks.check import check as look
    from llamahome.data.checks.duplicates import near_known
    from llamahome.data.checks.fix import refuse_output
    from llamahome.data.checks.languages import languages_known

    if dry_run and fix is None:
        raise UsageError(Problem(code="usage.missing-option", message="--dry-run shows what --fix would write", hint="--fix OUT --dry-run"))
    if fix is not None and not dry_run:
        refuse_output(fix, paths, force=force)
    tokenizer = None if no_tokens else tokenizer_of(loaded.config.model)
    if tokenizer is not None:
        loaded = fitted(loaded, tokenizer)
    near, languages = near_known() and not no_quality, languages_known() and not no_quality
    request = Request(
        tuple(paths), loaded.config.data, tokenizer, near=near, languages=languages, processes=processes, positions=positions_of(tokenizer)
    )
    started = time.monotonic()
    with _watching() as watch:
        checked = look(request, _print_json if as_json else lambda found: None, watch=watch)
    if tokenizer is not None:
        warn_of_length(loaded, tokenizer, [side for side in (checked.main, checked.evaluation) if side is not None])
    if not as_json:
        for block in _blocks(checked):
            print(block, file=sys.stderr)
    for line in _summary(checked, time.monotonic() - started):
        typer.echo(line, err=as_json)
    if fix is not None:
        known = checked.main is not None and checked.main.format is not None
        _write_copy(request, fix, readable=known, force=force, dry=dry_run, err=as_json)
    elif not as_json and checked.copy_pays():
        again = shlex.join(["llamahome", *sys.argv[1:], "--fix", _free_name()])
        print(f"help: {again}   writes a copy: mended where nothing is guessed, without rows that cannot be used", file=sys.stderr)
    if checked.tally.total("error"):
        raise typer.Exit(DataError.exit_status)


def _write_copy(request: "Request", out: Path, *, readable: bool, force: bool, dry: bool, err: bool) -> None:
    """Write the cleaned copy, or show each change that it would hold; on stderr where stdout holds JSON (`err`)."""
    from llamahome.data.checks.fix import fix
    from llamahome.data.checks.mend import show_change

    show = (lambda entry: typer.echo(visible(show_change(entry)), err=err)) if dry else None
    try:
        fixed = fix(request, out, force=force, preview=show)
    except DataError:
        if readable:
            raise
        typer.echo(f"{out} is not written: there are no rows of one format", err=err)
        return
    for line in _fixed_lines(fixed, out):
        typer.echo(f"would be written: {line}" if dry else line, err=err)


def stats(
    paths: Paths,
    model: Model = None,
    config: ConfigFiles = None,
    assignments: Assignments = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw the lengths into this file.", metavar="FILE")] = None,
    no_quality: NoQuality = False,
    processes: Processes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show lengths, what is learned, what each max_length would cut, what padding would waste."""
    from llamahome.data.checks.plots import require_plots, write_histogram

    if png is not None:
        require_plots()
    loaded = _settings(config, assignments, {"model.name": ("--model", model)})

    from llamahome.data.checks.check import Request
    from llamahome.data.checks.languages import languages_known
    from llamahome.data.checks.stats import stats_of

    languages = languages_known() and not no_quality
    tokenizer = tokenizer_of(loaded.config.model)
    loaded = fitted(loaded, tokenizer)
    side = _looked_over(Request(tuple(paths), loaded.config.data, tokenizer, languages=languages, processes=processes))
    for note in side.source.notes:
        typer.echo(note, err=True)
    figures = stats_of(side, loaded.config.data, languages=languages)
    if png is not None and figures.histogram:
        write_histogram(figures.histogram, png, max_length=figures.max_length, title=" ".join(paths))
    if as_json:
        typer.echo(json.dumps(figures.as_json(), ensure_ascii=False))
        return
    for line in _stats_lines(figures, paths):
        typer.echo(line)
    if png is not None:
        typer.echo(f"picture       {png}")


def _free_name() -> str:
    """clean.jsonl, or clean-2.jsonl where that is taken."""
    names = itertools.chain(["clean.jsonl"], (f"clean-{number}.jsonl" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def longest_rows(path: str, data: "DataConfig", tokenizer: "TokenizerPlace", count: int) -> list[int]:
    """Numbers of the rows with the most tokens, the longest first; raises DataError when the rows cannot be read."""
    import numpy as np

    from llamahome.data.checks.check import Request

    facts = _looked_over(Request((path,), data, tokenizer)).facts
    usable = np.flatnonzero(facts.usable)
    return [int(number) for number in usable[np.argsort(-facts.tokens[usable], kind="stable")[:count]]]


def _settings(config: list[Path] | None, assignments: list[str] | None, flags: dict[str, tuple[str, str | None]]) -> "LoadedConfig":
    from llamahome.config.check import check_config
    from llamahome.config.load import load_config

    given = {key: (flag, value) for key, (flag, value) in flags.items() if value is not None}
    loaded = load_config(config or (), assignments=assignments or (), flags=given)
    if problems := check_config(loaded.config, loaded.origins):
        raise ConfigError(problems)
    return loaded


def _looked_over(request: "Request") -> "Side":
    from llamahome.data.checks.check import look_over

    whole: list[Problem] = []

    def tell(found: "Found") -> None:
        if found.place is None and found.level == "error":
            whole.append(found.problem)

    with _watching() as watch:
        side = look_over(request, tell, watch=watch)
    if side is None or whole:
        raise DataError(whole)
    return side


@contextlib.contextmanager
def _watching() -> Iterator[Callable[[int, int], None]]:
    """How far it is, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rows", total=None)
        yield lambda done, rows: progress.update(task, completed=done, total=rows)


def _print_json(found: "Found") -> None:
    print(json.dumps(found.as_json(), ensure_ascii=False))


def _blocks(checked: "Checked") -> Iterator[str]:
    """The first findings of each kind, and how many there are more."""
    for kind in checked.tally.kinds():
        shown = checked.tally.first[kind]
        for found in shown:
            yield visible(found.problem.render(level=found.level))
        more = checked.tally.counts[kind] - len(shown)
        if more:
            yield f"and {more:,} more of {kind[1]}; --json prints all"


def _summary(checked: "Checked", seconds: float) -> Iterator[str]:
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

    yield f"{out}: {many(fixed.kept, 'row')}, {fixed.mended:,} of them mended; {fixed.dropped:,} left out"
    yield f"{out}{CHANGES}: {many(fixed.changes.total(), 'change')}" + "".join(
        f", {count:,} {code}" for code, count in sorted(fixed.changes.items())
    )


def _stats_lines(figures: "Stats", paths: list[str]) -> Iterator[str]:
    share = figures.targets / max(1, figures.tokens)
    yield f"rows          {figures.rows:,}" + (
        f", {figures.rows - figures.usable:,} cannot be used: {shlex.join(['llamahome', 'data', 'check', *paths])}"
        if figures.usable < figures.rows
        else ""
    )
    yield f"tokens        {figures.tokens:,}, {figures.mean:,.0f} a row, {share:.1%} of them learned"
    yield "lengths       " + ", ".join(f"{name} {length:,}" for name, length in figures.percentiles.items())
    yield f"an epoch      {figures.epoch_tokens:,} tokens, {figures.epoch_targets:,} learned, of {figures.epoch_examples:,} rows"
    yield f"padding       {figures.padding:.1%} of the positions, were {figures.padded_batch} random rows padded to the longest; none here"
    yield f"duplicates    {figures.duplicates:,}"
    if figures.languages is not None:
        yield "languages     " + (", ".join(f"{name} {count:,}" for name, count in list(figures.languages.items())[:8]) or "none is clear")
    yield ""
    yield f"{'tokens':>15}  rows"
    most = max((found.rows for found in figures.histogram), default=1)
    for found in figures.histogram:
        yield f"{found.begin:>6,} - {found.end - 1:>6,}  {_bar(found.rows / most)} {found.rows:,}"
    yield ""
    yield "max_length     rows cut        tokens lost        learned lost"
    for cut in figures.cuts:
        lost, unlearned = cut.tokens / max(1, figures.tokens), cut.targets / max(1, figures.targets)
        now = "  <- data.max_length" if cut.max_length == figures.max_length else ""
        yield f"{cut.max_length:>10,}  {cut.rows:>11,}  {cut.tokens:>10,} {lost:>6.1%}  {cut.targets:>11,} {unlearned:>6.1%}{now}"
    yield ""
    for row in figures.longest:
        yield f"{row.tokens:>10,} tokens, {row.targets:,} learned: {row.where}"


def _bar(share: float) -> str:
    """A bar of block characters, an eighth of a character fine; never empty for what is there."""
    eighths = max(1 if share > 0 else 0, round(share * _BAR * 8))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(_BAR)


def visible(text: str) -> str:
    """Control characters of the data must not reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
