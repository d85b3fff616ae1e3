"""`llamahome runs list | show`: the runs and their results; tail, compare and report are in files of their own. Imports no torch."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from llamahome.cli import options, runs_compare, runs_report, runs_tail
from llamahome.monitoring.readings import show_moment
from llamahome.rundir import as_typed, first_command, nearby, sweep_of
from llamahome.units import aligned, many, show_count, show_seconds

if TYPE_CHECKING:
    from llamahome.monitoring.report import Point, RunReport
    from llamahome.monitoring.runs import RunInfo


@click.group("runs", cls=options.Group)
def runs_app() -> None:
    """List runs, watch one, show or compare their results."""


@runs_app.command("list")
@options.as_json
def list_command(as_json: bool) -> None:
    """List every run, oldest first: state, step, losses, tokens, age. The runs of a sweep are in the table of their sweep."""
    from llamahome.monitoring.runs import list_runs
    from llamahome.monitoring.sinks import without_nan

    found = list_runs()
    runs = [run for run in found if sweep_of(run.folder) is None]
    for sweep, count in Counter(sweep for run in found if (sweep := sweep_of(run.folder)) is not None).items():
        click.echo(f"{many(count, 'run')} of a sweep not shown, see the table of {as_typed(sweep)}", err=True)
    if as_json:
        options.print_json(without_nan([_info_json(run) for run in runs]))
    elif not found:
        click.echo(f"no runs yet; start one with: {first_command()}")
    else:
        for line in _table(runs):
            click.echo(line)


@runs_app.command("show")
@click.argument("run", help="A run id or a part of it, a run's folder, or `latest`.")
@options.as_json
def show_command(run: str, as_json: bool) -> None:
    """Show one run: settings that are not defaults, losses, evaluations, checkpoints, counts, files."""
    from llamahome.monitoring.report import report_run
    from llamahome.monitoring.runs import find_run
    from llamahome.monitoring.sinks import without_nan

    report = report_run(find_run(run))
    if as_json:
        options.print_json(without_nan(_report_json(report)))
        return
    for name, text in _report_rows(report):
        click.echo(f"{name:<12}{text}".rstrip())


runs_app.add_command(runs_tail.tail)
runs_app.add_command(runs_compare.compare)
runs_app.add_command(runs_report.report)


def _table(runs: list["RunInfo"]) -> list[str]:
    header = ("run", "state", "step", "loss", "held-out", "tokens", "started")
    rows = [
        (
            run.run_id,
            run.state,
            "-" if run.step is None else f"{run.step}/{run.horizon}" if run.horizon else str(run.step),
            _number(run.loss),
            _number(run.eval_loss),
            "-" if run.tokens is None else show_count(run.tokens),
            show_moment(run.started),
        )
        for run in runs
    ]
    return aligned([header, *rows])


def _report_rows(report: "RunReport") -> list[tuple[str, str]]:
    info = report.info
    done = info.step or 0
    progress = f"{done} of {info.horizon} steps" if info.horizon else many(done, "step")
    early = f" ({info.ended_early})" if info.ended_early else ""
    rows = [
        ("run", info.run_id),
        ("state", f"{info.state}, {progress}{early}, started {show_moment(info.started)}"),
        ("folder", str(info.folder)),
    ]
    names = [each.describe() for each in report.lineage]
    rows += _labelled("began with", [name if not number else f"which began with {name}" for number, name in enumerate(names)])
    rows += _labelled(
        "settings", [f"{key}: {_setting(value)}" for key, value in report.changed_settings.items()] or ["all at their defaults"]
    )
    if report.settings_problem:
        rows = [row for row in rows if row[0] != "settings"] + [("settings", f"config.yaml cannot be read: {report.settings_problem}")]
    rows += _loss_rows(report)
    evaluations = [_evaluation(record, best=report.best) for record in report.evaluations]
    rows += _labelled("evaluations", evaluations or ["none"])
    if report.tokens:
        speed = f", {show_count(report.tokens / report.training_seconds)} tokens/s" if report.training_seconds else ""
        rows.append(("tokens", f"{show_count(report.tokens)}, of which {show_count(report.targets)} learned"))
        rows.append(("time", f"{show_seconds(report.training_seconds)} in training steps{speed}"))
    if report.events:
        rows.append(("events", ", ".join(f"{kind} {count}" for kind, count in report.events.items())))
    saved = [path for _, path in report.checkpoints] + ([report.final] if report.final else [])
    rows += _labelled("checkpoints", [str(nearby(path)) for path in saved] or ["none"])
    rows += _labelled("files", [str(nearby(path)) for path in report.files])
    if report.damaged_lines:
        rows.append(("warning", f"{report.damaged_lines} lines of metrics.jsonl cannot be read and are left out here"))
    return rows


def _loss_rows(report: "RunReport") -> list[tuple[str, str]]:
    from llamahome.monitoring.display import sparkline

    if not report.losses and any(step for step, _ in report.checkpoints):
        return [("loss", "unknown: the metrics of this run are not in data/metrics/logs of this working folder")]
    if not report.losses:
        return [("loss", "no step has been done")]
    first, last = report.losses[0], report.losses[-1]
    finite = [point for point in report.losses if math.isfinite(point.value)]
    lowest = min(finite, key=lambda point: point.value, default=first)
    text = f"first {_at(first)}, last {_at(last)}, lowest {_at(lowest)}"
    width = max(10, min(60, shutil.get_terminal_size().columns - 14))
    return [("loss", text), ("", sparkline([point.value for point in report.losses], width=width, unicode=options.prints_unicode()))]


def _evaluation(record: dict[str, float], *, best: "Point | None") -> str:
    parts = [f"{name.removeprefix('eval/').replace('_', ' ')} {value:.4f}" for name, value in record.items() if name.startswith("eval/")]
    mark = " (best)" if best is not None and int(record["step"]) == best.step else ""
    return f"step {int(record['step'])}: " + ", ".join(parts) + mark


def _report_json(report: "RunReport") -> dict[str, Any]:
    points = {"first": report.losses[0], "last": report.losses[-1], "best_evaluation": report.best} if report.losses else {}
    return {
        **_info_json(report.info),
        "settings": report.changed_settings,
        "settings_problem": report.settings_problem,
        "loss_points": {name: dataclasses.asdict(point) for name, point in points.items() if point is not None},
        "losses": [[point.step, point.value] for point in report.losses],
        "evaluations": report.evaluations,
        "checkpoints": [{"step": step, "path": str(nearby(path))} for step, path in report.checkpoints],
        "lineage": [dataclasses.asdict(each) for each in report.lineage],
        "final": None if report.final is None else str(nearby(report.final)),
        "tokens": report.tokens,
        "targets": report.targets,
        "training_seconds": report.training_seconds,
        "events": report.events,
        "files": [str(nearby(path)) for path in report.files],
        "damaged_lines": report.damaged_lines,
    }


def _info_json(info: "RunInfo") -> dict[str, Any]:
    return {**dataclasses.asdict(info), "folder": str(info.folder)}


def _labelled(name: str, lines: list[str]) -> list[tuple[str, str]]:
    return [(name if number == 0 else "", line) for number, line in enumerate(lines)]


def _at(point: "Point") -> str:
    return f"{point.value:.4f} at step {point.step}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | bool) or value is None else str(value)
