"""The events of a run in words: saves, refused steps, alerts, signals, resumes. Records of unknown shape are shown as they are."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llamahome.monitoring.alerts import is_alert
from llamahome.monitoring.readings import moment, whole

Level = Literal["note", "alert", "trouble"]

_TROUBLE = ("bad-step", "out-of-memory", "save-failed", "failed", "rolled-back", "diverged")
_KNOWN = ("t", "kind", "event", "step", "text", "why", "help", "alert", "rows", "row_ids", "show")


@dataclass(frozen=True)
class Event:
    """One event of a run."""

    time: float | None
    step: int | None
    kind: str
    """What happened, in a word: saved, bad-step, alert."""
    level: Level
    text: str
    help: str | None
    """What to do about it, usually a command or a setting."""
    rows: tuple[str, ...]
    """The rows of the data that it is about, as file:line."""
    show: str | None
    """The command that shows these rows in a terminal."""


def found_events(records: Iterable[dict[str, Any]]) -> list[Event]:
    """The events of events.jsonl, in order. An alert may say `"kind": "alert"` or `"event": "alert"`."""
    return [_event(record) for record in records]


def _event(record: dict[str, Any]) -> Event:
    kind = str(record.get("kind", record.get("event", "event")))
    alert = is_alert(record)
    level: Level = "alert" if alert else "trouble" if kind in _TROUBLE else "note"
    rows = record.get("rows", record.get("row_ids"))
    rest = {name: value for name, value in record.items() if name not in _KNOWN}
    if rows is not None and not isinstance(rows, list):
        rest["rows"] = rows  # the event `rows` has counts there
    text = record.get("text", record.get("why"))
    return Event(
        time=moment(record.get("t")),
        step=whole(record.get("step")),
        kind=str(record.get("alert", "alert")) if alert else kind,
        level=level,
        text=text if isinstance(text, str) else ", ".join(f"{name} {_plain(value)}" for name, value in rest.items()),
        help=record["help"] if isinstance(record.get("help"), str) else None,
        rows=tuple(map(str, rows)) if isinstance(rows, list) else (),
        show=record["show"] if isinstance(record.get("show"), str) else None,
    )


def marks(events: Sequence[Event]) -> list[dict[str, Any]]:
    """What charts draw at a step: checkpoints, alerts, trouble, resumes."""
    drawn = [event for event in events if event.step is not None and (event.level != "note" or event.kind in ("saved", "resumed"))]
    return [{"step": event.step, "kind": event.kind, "level": event.level} for event in drawn]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
