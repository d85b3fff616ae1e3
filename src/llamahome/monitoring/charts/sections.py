"""Parts of report.html that show records: alerts, evaluations, samples, environment, events. No torch."""

import math
from html import escape
from typing import Any

from llamahome.durable import read_object
from llamahome.monitoring.alerts import is_alert, said_of
from llamahome.monitoring.readings import show_moment, whole
from llamahome.monitoring.report import RunReport
from llamahome.monitoring.runs import read_records
from llamahome.rundir import RunPaths
from llamahome.units import many, show_bytes

_MOST_PROMPTS = 20
_MOST_EVENTS = 200
_KNOWN = {"t", "kind", "event"}


def alerts(report: RunReport) -> str:
    """Every alert with its step, what it says, and what to type, in the order in which they were raised."""
    found = report.alerts
    if not found:
        return ""
    lines = []
    for alert in found:
        text, advice = said_of(alert)
        step = f"step {alert['step']:,}: " if whole(alert.get("step")) is not None else ""
        lines.append(f'<p class="note">{escape(step + text)}{f"<br><code>{escape(advice)}</code>" if advice else ""}</p>')
    return f"<h2>Alerts</h2>{''.join(lines)}"


def evaluations(report: RunReport) -> str:
    """The held-out figures by step, the best one marked."""
    names = list(dict.fromkeys(name for record in report.evaluations for name in record if name.startswith("eval/")))
    if not names:
        return ""
    head = "".join(f"<th>{escape(name.removeprefix('eval/').replace('_', ' '))}</th>" for name in names)
    rows = []
    for record in report.evaluations:
        is_best = report.best is not None and record["step"] == report.best.step
        cells = "".join(f"<td>{_figure(record.get(name))}</td>" for name in names)
        mark = ' class="chosen"' if is_best else ""
        rows.append(f"<tr{mark}><td>{record['step']:,.0f}{' (best)' if is_best else ''}</td>{cells}</tr>")
    table = f'<table class="numbers"><thead><tr><th>step</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<h2>Evaluations</h2><div class="card">{table}</div>'


def samples(paths: RunPaths) -> str:
    """For every prompt its reference, the first answer and the last one; those in between can be opened."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(paths.metrics_dir / "samples.jsonl").records:
        answers.setdefault(str(record.get("prompt", "")), []).append(record)
    if not answers:
        return ""
    shown = []
    for prompt, records in list(answers.items())[:_MOST_PROMPTS]:
        first, *between = records
        rows = [("prompt", prompt, ""), ("reference", records[-1].get("reference", ""), ""), _answer(first, "was" if between else "")]
        rows += [_answer(between.pop(), "")] if between else []
        text = "".join(f'<dt>{name}</dt><dd class="{kind}">{escape(str(value)) or "(nothing)"}</dd>' for name, value, kind in rows)
        more = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value, _ in (_answer(record, "") for record in between))
        more = f"<details><summary>{many(len(between), 'answer')} in between</summary><dl>{more}</dl></details>" if more else ""
        shown.append(f'<div class="sample"><dl>{text}</dl>{more}</div>')
    left = f'<p class="empty">{len(answers) - _MOST_PROMPTS} more prompts in samples.jsonl</p>' if len(answers) > _MOST_PROMPTS else ""
    return f'<h2>Samples</h2><div class="card">{"".join(shown)}{left}</div>'


def _answer(record: dict[str, Any], kind: str) -> tuple[str, Any, str]:
    return f"step {record.get('step', '?')}", record.get("answer", ""), kind


def environment(paths: RunPaths) -> str:
    """Versions, machine and command, as environment.json holds them."""
    content = read_object(paths.environment)
    if not content:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(_words(name.removesuffix("_bytes")))}</th><td>{_text(name, value)}</td></tr>'
        for name, value in content.items()
    )
    return f'<h2>Environment</h2><div class="card"><table>{rows}</table></div>'


def _text(name: str, value: Any) -> str:
    if name.endswith("_bytes") and (size := whole(value)) is not None:
        return show_bytes(size)
    if isinstance(value, dict):
        return escape(", ".join(f"{name} {version}" for name, version in value.items()))
    if isinstance(value, list):
        return f"<code>{escape(' '.join(map(str, value)))}</code>" if value else "none"
    return escape(str(value))


def events(report: RunReport) -> str:
    """What happened when, closed at first."""
    found = [event for event in report.event_records if not is_alert(event)]
    if not found:
        return ""
    rows = []
    for event in found[-_MOST_EVENTS:]:
        when = show_moment(event.get("t"), "%Y-%m-%d %H:%M:%S")
        more = ", ".join(f"{_words(name)} {value}" for name, value in event.items() if name not in _KNOWN)
        kind = escape(str(event.get("kind", event.get("event"))))
        rows.append(f'<tr><td class="from">{when}</td><th scope="row">{kind}</th><td>{escape(more)}</td></tr>')
    count = f"{len(found):,} events" if len(found) <= _MOST_EVENTS else f"the last {_MOST_EVENTS} of {len(found):,} events"
    return f'<h2>Events</h2><div class="card"><details><summary>{count}</summary><table>{"".join(rows)}</table></details></div>'


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "not finite"
