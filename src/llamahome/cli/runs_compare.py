"""`llamahome runs compare`: what differs between runs, in settings and in results. Only reads files, and imports no torch."""

import shutil
from typing import TYPE_CHECKING

import click

from llamahome.cli import options

if TYPE_CHECKING:
    from llamahome.monitoring.report import RunReport

_CURVES = (("train/loss", "training loss"), ("eval/loss", "held-out loss"), ("train/reward", "reward"))
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@click.command(epilog=options.examples("llamahome runs compare otter finch", "llamahome runs compare otter finch --json"))
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, help="Two runs or more: run ids or parts of them, folders, or `latest`.")
@options.as_json
def compare(runs: tuple[str, ...], as_json: bool) -> None:
    """Compare runs: the settings that differ, the results, and the losses as curves on one scale."""
    from llamahome.monitoring.compare import as_json as compared
    from llamahome.monitoring.report import report_run
    from llamahome.monitoring.runs import find_run
    from llamahome.monitoring.sinks import without_nan

    if not 2 <= len(runs) <= len(_LETTERS):
        raise click.UsageError(f"compare takes 2 to {len(_LETTERS)} runs, not {len(runs)}")
    reports = [report_run(find_run(run, typed=("compare", *runs))) for run in runs]
    if as_json:
        options.print_json(without_nan(compared(reports)))
        return
    for line in _lines(reports):
        click.echo(line.rstrip())


def _lines(reports: "list[RunReport]") -> list[str]:
    from llamahome.monitoring.compare import curve_lines, differing_settings, figure_rows
    from llamahome.units import aligned

    letters = _LETTERS[: len(reports)]
    lines = [f"{letter}  {report.info.run_id}, {report.info.state}" for letter, report in zip(letters, reports, strict=True)]
    for letter, report in zip(letters, reports, strict=True):
        if report.settings_problem:
            lines.append(f"   settings of {letter} cannot be read and are left out: {report.settings_problem}")
        if report.damaged_lines:
            lines.append(f"   {report.damaged_lines} lines of metrics.jsonl of {letter} cannot be read and are left out")
    settings = [(each.key, *each.shown()) for each in differing_settings(reports)]
    results = [(name, *texts) for name, texts in figure_rows(reports)]
    table = aligned([("setting", *letters), *settings, ("result", *letters), *results])
    split = len(settings) + 1
    lines += ["", *(table[:split] if settings else ["settings: the same in all of them, or unknown"]), "", *table[split:]]
    width = max(20, min(100, shutil.get_terminal_size().columns - 4))
    for metric, title in _CURVES:
        drawn = curve_lines(reports, metric, width=width, unicode=options.prints_unicode())
        if drawn is not None:
            scale, *curves = drawn
            lines += ["", f"{title}, {scale}", *(f"{letter}  {curve}" for letter, curve in zip(letters, curves, strict=True))]
    return lines
