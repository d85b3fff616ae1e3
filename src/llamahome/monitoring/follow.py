"""Follows a run through its files and shows it as the run itself does, from another terminal and also after the run has ended. No torch.

Nothing is sent to the run: its files are read once a second, so closing or killing a viewer never touches a training. A half-written
last line waits for its end, and a run that begins again after a checkpoint is shown anew.
"""

import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamahome.config.load import read_saved_config
from llamahome.durable import read_object
from llamahome.errors import ConfigError
from llamahome.known_runs import to_type
from llamahome.monitoring.alerts import is_alert, said_of
from llamahome.monitoring.display import RunSummary, read_summary
from llamahome.monitoring.progress import Progress
from llamahome.monitoring.readings import moment, show_moment, whole
from llamahome.monitoring.runs import RunInfo, describe_run, numbers_of
from llamahome.monitoring.series import Cursor, read_from
from llamahome.monitoring.status import LOST_AFTER_SECONDS
from llamahome.rundir import RunPaths, as_typed, nearby

Record = dict[str, Any]

_BEGINNINGS = ("started", "resumed")
_PLAIN_RECORDS = 50
"""Between the two lines of the past that are shown off a terminal; the time left is computed from their distance."""
_PAST_ALERTS = 3


class ViewClock:
    """The time of a view: that of the record that is being shown, and the time of day once all records are shown."""

    def __init__(self) -> None:
        self.fixed: float | None = None

    def __call__(self) -> float:
        """Unix seconds."""
        return time.time() if self.fixed is None else self.fixed


class Files:
    """What was appended to metrics.jsonl and events.jsonl since the last time."""

    def __init__(self, paths: RunPaths) -> None:
        self._files = (paths.metrics_dir / "metrics.jsonl", paths.metrics_dir / "events.jsonl")
        self._cursors = [Cursor(), Cursor()]
        self.restarted = False
        """Whether a file was replaced: its records were read again from its beginning."""
        self.damaged = 0

    def metrics(self) -> Iterator[Record]:
        """New metrics, in pieces, so that a long file takes little memory."""
        return self._new(0)

    def events(self) -> Iterator[Record]:
        """New events."""
        return self._new(1)

    def _new(self, number: int) -> Iterator[Record]:
        more = True
        while more:
            read = read_from(self._files[number], self._cursors[number])
            self._cursors[number], more = read.cursor, read.more
            self.restarted |= read.restarted
            self.damaged += read.damaged
            yield from read.records


class Follower:
    """Shows one run; `open_view` makes a view that reads the time from the clock that it is given.

    A view with `plain` lines gets only the end of the past, because each of its lines stays on the screen.
    """

    def __init__(self, paths: RunPaths, open_view: Callable[[ViewClock], Progress], *, plain: bool) -> None:
        self._paths, self._open_view, self._plain = paths, open_view, plain
        self._clock = ViewClock()
        self._view = open_view(self._clock)
        self._files = Files(paths)
        self._begun = False
        self._was_alive = False

    def poll(self) -> RunInfo:
        """Show what is new, and return how the run stands."""
        info = describe_run(self._paths)
        events = list(self._files.events())
        if not self._begun or self._files.restarted or any(event.get("kind") in _BEGINNINGS for event in events):
            self._begin(info)
        else:
            self._show_events(events)
            self._feed(self._files.metrics())
        self._clock.fixed = None if info.state == "running" else info.heartbeat
        return info

    def _begin(self, info: RunInfo) -> None:
        """Show the run from its last beginning on; nothing yet if it has not begun to train."""
        self._files = Files(self._paths)
        events = list(self._files.events())
        start = next((event for event in reversed(events) if event.get("kind") in _BEGINNINGS), Record())
        began, before = moment(start.get("t")), whole(start.get("step")) or 0
        records = (record for record in self._files.metrics() if before < (whole(record.get("step")) or 0) or not before)
        first = next((record for record in records if "train/loss" in record), None)
        summary = read_summary(self._paths.metrics_dir)
        if summary is None and first is None:
            return
        if self._begun:
            self._view.close()
            self._view = self._open_view(self._clock)
        self._begun = True
        self._clock.fixed = began or (moment(first.get("t")) if first is not None else None) or time.time()
        self._view.start(summary or _bare_summary(self._paths, info))
        past = [] if first is None else [first]
        if self._plain:
            last = deque(records, maxlen=_PLAIN_RECORDS)
            known = [record for record in last if "train/loss" in record]
            evaluated = [record for record in last if "eval/loss" in record]
            past = [*(known[:1] or past), *evaluated[-1:], *known[1:][-1:]]
        self._feed(past)
        self._feed([] if self._plain else records)
        self._show_events(events, past=True)

    def _feed(self, records: Iterable[Record]) -> None:
        for record in records:
            step = whole(record.get("step"))
            if step is None:
                continue
            self._clock.fixed = moment(record.get("t")) or self._clock.fixed
            numbers = numbers_of([record])[0]
            metrics = {name: value for name, value in numbers.items() if name not in ("t", "step")}
            if "train/loss" in metrics:
                self._view.update(step, metrics)
            elif any(name.startswith("eval/") for name in metrics):
                self._view.evaluated(step, metrics)

    def _show_events(self, events: list[Record], *, past: bool = False) -> None:
        alerts = [event for event in events if is_alert(event)]
        for alert in alerts[-_PAST_ALERTS:] if past else alerts:
            text, advice = said_of(alert)
            self._view.alert(whole(alert.get("step")) or 0, text, advice or "see the report of the run")
        if past and self._plain:
            self._view.close()  # writes the line that waits for more
            return
        saved = [event for event in events if event.get("kind") == "saved" and whole(event.get("step")) is not None]
        for event in saved[-1:]:
            self._view.saved(event["step"], nearby(self._paths.checkpoint(event["step"])))

    def is_over(self, info: RunInfo) -> bool:
        """Whether nothing more will come. A process that is gone while it is watched has half a minute to be started again."""
        if info.state == "running":
            self._was_alive = True
            return False
        silent = time.time() - (info.heartbeat or 0.0)
        return info.state != "lost" or not self._was_alive or silent > LOST_AFTER_SECONDS

    def close(self) -> None:
        """Restore the terminal."""
        self._view.close()

    def finish(self, info: RunInfo) -> None:
        """Show how the run ended and what to type now."""
        damaged = [f"{self._files.damaged} lines of its files cannot be read and are left out"] if self._files.damaged else []
        self._view.finish([*damaged, *farewell(self._paths, info)])


def farewell(paths: RunPaths, info: RunInfo) -> list[str]:
    """How a run that no longer trains has ended, and the command that goes on from there."""
    if not paths.root.exists():
        return [f"{paths.run_id} is gone: there is no folder {as_typed(paths.root)} any more", "next: llamahome runs list"]
    at = f"step {info.step:,}" if info.step is not None else "no step"
    status = read_object(paths.metrics_dir / "status.json")
    when = show_moment(info.heartbeat, "%Y-%m-%d %H:%M:%S") or "an unknown time"
    if info.state == "finished":
        page = [f"report: {as_typed(paths.report)}"] if paths.report.is_file() else []
        return [f"{paths.run_id} finished at {when} after {at}", *page, f"next: llamahome runs show {to_type(paths)}"]
    if info.state == "lost" and not status:
        first = f"{paths.run_id} has no status.json: it ended before its first step, or it is of an older version"
    elif info.state == "lost":
        first = f"{paths.run_id}: the process {status.get('pid')} on {status.get('host')} is gone; its last sign was at {when}, after {at}"
    else:
        first = f"{paths.run_id} {'failed' if info.state == 'failed' else 'was stopped'} at {when} after {at}"
    log = [f"log: {as_typed(paths.rank_log(0))}"] if info.state != "stopped" and paths.rank_log(0).is_file() else []
    if paths.checkpoints():
        return [first, *log, f"to go on from {paths.checkpoints()[-1][1].name}: llamahome train-resume {as_typed(paths.root)}"]
    command = _command(paths.environment)
    return [first, *log, "no checkpoint was saved" + (f"; it was started with: {command}" if command else "")]


def _command(environment: Path) -> str | None:
    """What was typed to start the run."""
    words = read_object(environment).get("command")
    return shlex.join(["llamahome", *map(str, words[1:])]) if isinstance(words, list) and words else None


def _bare_summary(paths: RunPaths, info: RunInfo) -> RunSummary:
    """What the settings say about a run of a version that wrote no summary.json."""
    try:
        config = read_saved_config(paths.config).config
        model, method, epochs = config.model.name, str(config.training.method), config.training.epochs
    except ConfigError:
        model, method, epochs = "base model unknown", "settings cannot be read", 1.0
    return RunSummary(
        run_id=paths.run_id,
        model=model,
        method=method,
        trained_share=1.0,
        train_rows=0,
        eval_rows=0,
        mean_tokens=0.0,
        target_share=0.0,
        batch_size=1,
        tokens_per_step=0.0,
        micro_batch_tokens=0,
        processes=1,
        horizon=max(1, info.horizon or info.step or 1),
        epochs=epochs if isinstance(epochs, int | float) else 1.0,
        folder=str(nearby(paths.root)),
    )


def records_of(files: Files) -> Iterator[Mapping[str, Any]]:
    """New metrics and events of a run, each with its kind, for other programs."""
    for event in files.events():
        yield {"kind": "event", **event}
    for record in files.metrics():
        yield {"kind": "metrics", **record}
