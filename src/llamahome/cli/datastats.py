"""`data stats`: lengths of rows, what is learned of them, and what each data.max_length would cut; imports nothing heavy at the top."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llamahome.cli import options
from llamahome.cli.datacheck import no_quality, paths, processes, progress_bar, tokenizer_model
from llamahome.cli.model_limits import find_tokenizer, fit_settings
from llamahome.config.objectives import learns_rows
from llamahome.errors import DataError, Problem
from llamahome.units import many

if TYPE_CHECKING:
    from llamahome.config.schema import DataConfig
    from llamahome.data.checks.check import Request
    from llamahome.data.checks.compare import Side
    from llamahome.data.checks.findings import Found
    from llamahome.data.checks.stats import Stats
    from llamahome.data.text.tokenizer_files import TokenizerSource

_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@click.command()
@paths
@tokenizer_model
@options.config_files
@options.assignments
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Draw the lengths into this file.")
@no_quality
@processes
@options.as_json
@options.pass_overrides
def stats(
    overrides: options.Overrides, paths: tuple[str, ...], png: Path | None, no_quality: bool, processes: int | None, as_json: bool
) -> None:
    """Show lengths, what is learned, what each max_length would cut, what padding would waste."""
    from llamahome.data.checks.stats import require_plots, write_histogram

    if png is not None:
        require_plots()
    loaded = overrides.load()
    options.check_settings(loaded)

    from llamahome.data.checks.answer_quality import languages_known
    from llamahome.data.checks.check import Request
    from llamahome.data.checks.stats import stats_of

    languages = languages_known() and not no_quality
    tokenizer = find_tokenizer(loaded.config.model)
    data = fit_settings(loaded, tokenizer).config.data
    side = _scan(Request(paths, data, tokenizer, languages=languages, processes=processes))
    for note in side.source.notes:
        click.echo(note, err=True)
    figures = stats_of(side, data, languages=languages, learned=learns_rows(loaded.config.training.objective))
    if png is not None and figures.histogram:
        write_histogram(figures.histogram, png, max_length=figures.max_length, title=" ".join(paths))
    if as_json:
        click.echo(json.dumps(asdict(figures), ensure_ascii=False))
        return
    for line in _stats_lines(figures, paths):
        click.echo(line)
    if png is not None:
        click.echo(f"picture       {png}")


def longest_rows(paths: Sequence[str], data: "DataConfig", tokenizer: "TokenizerSource", count: int) -> list[int]:
    """Indices of the `count` rows with the most tokens, the longest first; raises DataError if the rows cannot be read."""
    import numpy as np

    from llamahome.data.checks.check import Request

    facts = _scan(Request(tuple(paths), data, tokenizer)).facts
    usable = np.flatnonzero(facts.usable)
    return [int(number) for number in usable[np.argsort(-facts.needed[usable], kind="stable")[:count]]]


def _scan(request: "Request") -> "Side":
    """Read all rows; raises DataError if a file cannot be read at all, or with the errors of the rows if not one of them is usable."""
    from llamahome.data.checks.check import look_over
    from llamahome.data.checks.findings import Tally

    problems: list[Problem] = []
    of_rows = Tally()

    def keep_errors(found: "Found") -> None:
        if found.level == "error" and found.place is None:
            problems.append(found.problem)
        elif found.level == "error":
            of_rows.add(found)

    with progress_bar() as watch:
        side = look_over(request, keep_errors, watch=watch)
    if side is None or problems:
        raise DataError(problems)
    if len(side.facts) and not side.facts.usable.any():
        shown = [found.problem for found in of_rows.shown()]
        if len(shown) < of_rows.total("error"):
            message = f"not one of {many(len(side.facts), 'row')} can be used; the first errors of each kind are above"
            check = shlex.join(["llamahome", "data", "check", *request.paths])
            shown.append(Problem(code="data.bad-rows", message=message, where=", ".join(request.paths), hint=f"{check} --json"))
        raise DataError(shown)
    return side


def _stats_lines(figures: "Stats", paths: tuple[str, ...]) -> Iterator[str]:
    share = f"{figures.targets / max(1, figures.tokens):.1%} of them learned"
    learned = share if not figures.references else "none of them learned: the model learns from answers of its own"
    yield f"rows          {figures.rows:,}" + (
        f", {figures.rows - figures.usable:,} cannot be used: {shlex.join(['llamahome', 'data', 'check', *paths])}"
        if figures.usable < figures.rows
        else ""
    )
    yield f"tokens        {figures.tokens:,}, {figures.mean:,.0f} a row, {learned}"
    yield "lengths       " + ", ".join(f"{name} {length:,}" for name, length in figures.percentiles.items())
    yield f"an epoch      {figures.epoch_tokens:,} tokens, {figures.epoch_targets:,} learned, of {figures.epoch_examples:,} rows"
    padded = f"if batches of {figures.padded_batch} random rows were padded to their longest"
    yield f"padding       {figures.padding:.1%} of the positions {padded}; training pads none"
    yield f"duplicates    {figures.duplicates:,}"
    if figures.languages is not None:
        yield "languages     " + (", ".join(f"{name} {count:,}" for name, count in list(figures.languages.items())[:8]) or "none is clear")
    yield ""
    yield f"{'tokens':>15}  rows"
    most = max((bin_.rows for bin_ in figures.histogram), default=1)
    for bin_ in figures.histogram:
        yield f"{bin_.begin:>6,} - {bin_.end - 1:>6,}  {_bar(bin_.rows / most)} {bin_.rows:,}"
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
    """A bar of block characters with a resolution of an eighth."""
    eighths = max(1 if share > 0 else 0, round(share * _BAR * 8))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(_BAR)
