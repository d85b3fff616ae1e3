"""report.html: one run as one page that opens anywhere: charts, settings, evaluations, samples, alerts, environment. No torch.

The page holds everything that it shows, and its policy forbids every request. It is written at the end of a run and by `runs report`;
whatever file is missing, cut or of an older version is left out, and the page says so. Cost: measured 0.5 s of one core for 10,000 steps.
"""

import base64
import hashlib
import time
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from llamahome import __version__, durable
from llamahome.config.load import is_chosen
from llamahome.config.yamltext import write_value
from llamahome.known_runs import to_type
from llamahome.monitoring.charts import sections
from llamahome.monitoring.charts.curves import Chart, charts_of, short
from llamahome.monitoring.charts.svg import draw
from llamahome.monitoring.display import summary_rows
from llamahome.monitoring.readings import show_moment
from llamahome.monitoring.report import RunReport, report_run
from llamahome.rundir import RunPaths, as_typed, open_run
from llamahome.units import show_count, show_seconds

_FOLDER = Path(__file__).parent


def write_report(paths: RunPaths, output: Path | None = None) -> Path:
    """Write the page to `output`, or to report.html in the run's folder, and return its path. Raises OSError."""
    target = paths.report if output is None else output
    durable.write_whole(target, page(paths).encode("utf-8", "backslashreplace"), flush=False)  # names of files may be no UTF-8
    return target


def page(paths: RunPaths) -> str:
    """The page of a run, from its files as they are now."""
    report = report_run(paths)
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    charts = charts_of_run(report)
    drawn = "\n".join(draw(chart) for chart in charts)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.info.run_id)}</title><style>{style}</style></head><body>",
        _header(report),
        "<main>",
        _notes(report, paths),
        sections.alerts(report),
        "<h2>Course of the run</h2>",
        f'<div class="charts">{drawn}</div>' if charts else '<p class="card empty">No step has been recorded.</p>',
        sections.evaluations(report),
        sections.samples(paths),
        _settings(report),
        _data(report),
        sections.environment(paths),
        sections.events(report),
        _files(report),
        "</main>",
        f"<footer>Written by llamahome {escape(__version__)} on {show_moment(time.time())} from the files of the run.</footer>",
        f"<script>{script}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def charts_of_run(report: RunReport) -> list[Chart]:
    """The charts of a run; the best evaluation is marked if it is one of the loss."""
    best = report.best if report.settings.get("evaluation.metric", "loss") == "loss" else None
    return charts_of(report.records, best=(best.step, best.value) if best is not None else None)


def _header(report: RunReport) -> str:
    info, summary = report.info, report.summary
    what = f"{summary.model}, {summary.method}" if summary else str(report.settings.get("model.name", "base model unknown"))
    tiles = [("Steps", f"{info.step or 0:,}", f"of {info.horizon:,} planned" if info.horizon else "plan unknown")]
    name = str(report.settings.get("evaluation.metric", "loss"))
    if report.best is not None:
        tiles.append((f"Best held-out {name if name == 'loss' else 'score'}", f"{report.best.value:.4f}", f"at step {report.best.step:,}"))
    if report.losses:
        tiles.append(("Last training loss", f"{report.losses[-1].value:.4f}", f"first {report.losses[0].value:.4f}"))
    if report.tokens_per_second:
        tiles.append(("Speed", f"{show_count(report.tokens_per_second)}", "tokens per second"))
        tiles.append(("Time", show_seconds(report.training_seconds), "in training steps"))
    if report.tokens:
        tiles.append(("Tokens", short(report.tokens), f"{short(report.targets)} learned"))
    cells = "".join(f"<div><dt>{escape(title)}</dt><dd>{escape(value)}</dd><dd>{escape(more)}</dd></div>" for title, value, more in tiles)
    return (
        f'<header><div class="title"><h1>{escape(info.run_id)}</h1><span class="state {info.state}">{info.state}</span></div>'
        f'<p>{escape(what)}; started {show_moment(info.started)}</p><dl class="tiles">{cells}</dl></header>'
    )


def _notes(report: RunReport, paths: RunPaths) -> str:
    """What the reader must know: how the run stands, and what could not be read."""
    notes: list[tuple[str, str]] = []
    resume = f"<code>llamahome train-resume {escape(as_typed(paths.root))}</code>"
    again = f"; to go on: {resume}" if report.checkpoints else ""
    sign = show_moment(report.info.heartbeat) or "an unknown time"
    if report.info.state == "running":
        notes.append(("", f"The run was still training when this page was written, at step {report.info.step or 0:,}."))
    elif report.info.state == "lost":
        notes.append(("bad", f"The process of this run is gone; its last sign is of {sign}{again}"))
    elif report.info.state != "finished":
        ended = "failed" if report.info.state == "failed" else "was stopped"
        notes.append(("bad" if report.info.state == "failed" else "", f"The run {ended} after step {report.info.step or 0:,}{again}"))
    elif report.info.ended_early:
        notes.append(("", f"The run ended before its last planned step: {report.info.ended_early}."))
    if report.settings_problem:
        notes.append(("", f"Settings are left out, because config.yaml cannot be read: {escape(report.settings_problem)}"))
    if not (paths.metrics_dir / "metrics.jsonl").is_file():
        notes.append(("", f"There are no metrics: {escape(str(paths.metrics_dir))}/metrics.jsonl is missing."))
    elif report.summary is None:
        notes.append(("", "Model and data are left out: the run is of a version that wrote no summary.json, or has not begun to train."))
    if report.damaged_lines:
        notes.append(("", f"{report.damaged_lines:,} lines of metrics.jsonl cannot be read and are left out."))
    return "\n".join(f'<p class="note {kind}">{text}</p>' for kind, text in notes)


def _settings(report: RunReport) -> str:
    if not report.settings:
        return ""

    def rows(keys: Iterable[str]) -> str:
        lines = []
        for key in keys:
            source = report.origins.get(key, "")
            value = escape(write_value(report.settings[key]))
            lines.append(f'<tr><th scope="row">{key}</th><td>{value}</td><td class="from">{escape(source)}</td></tr>')
        return f"<table>{''.join(lines)}</table>"

    chosen = [key for key in report.settings if key in report.changed_settings or is_chosen(report.origins.get(key, "default"))]
    shown = rows(chosen) if chosen else '<p class="empty">All settings are at their defaults.</p>'
    every = f"<details><summary>All {len(report.settings)} settings</summary>{rows(report.settings)}</details>"
    return f'<h2>Settings</h2><div class="card">{shown}{every}</div>'


def _data(report: RunReport) -> str:
    if report.summary is None:
        return ""
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{escape(text)}</td></tr>' for name, text in summary_rows(report.summary))
    epochs = f'<tr><th scope="row">plan</th><td>{report.summary.horizon:,} steps, {report.summary.epochs:.4g} epochs</td></tr>'
    return f'<h2>Model and data</h2><div class="card"><table>{rows}{epochs}</table></div>'


def _files(report: RunReport) -> str:
    saved = [(f"checkpoint of step {step:,}", path) for step, path in report.checkpoints]
    if report.final is not None:
        saved.append(("final model", report.final))
    rows: list[tuple[str, Any]] = [*saved, *(("file", path) for path in report.files)]
    lines = "".join(f'<tr><th scope="row">{name}</th><td><code>{escape(as_typed(path))}</code></td></tr>' for name, path in rows)
    commands = [f"llamahome runs show {to_type(open_run(report.info.folder))}"]
    if report.final is not None:
        commands.append(f"llamahome chat {as_typed(report.final)}")
    lines += "".join(f'<tr><th scope="row">to type</th><td><code>{escape(command)}</code></td></tr>' for command in commands)
    return f'<h2>Files</h2><div class="card"><table>{lines}</table></div>'
