"""What an open page of a run gets while the run trains, as server-sent events: new records, new events, the state.

The id of each event is the position in metrics.jsonl, so a browser that was cut off goes on where it was. A page gets at most a few
records twice a second, of a fast run those with the lowest and the highest values: under 10 kB/s whatever the speed of the run.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from llamahome.dashboard.events import found_events, marks
from llamahome.dashboard.library import Library
from llamahome.dashboard.pages import run_row
from llamahome.monitoring.display import read_summary
from llamahome.monitoring.readings import moment, number, whole
from llamahome.monitoring.series import Cursor, read_from
from llamahome.rundir import RunPaths

_SECONDS = 0.5
_TICKS_TO_PING = 30
"""A comment after 15 s of silence finds out that the browser has left."""
_MOST_RECORDS = 4
_LEFT_OUT = ("train/targets", "speed/targets_per_s", "net/sent", "net/exchanges", "eval/perplexity")


def cursor_of(text: str) -> Cursor | None:
    """`INODE-OFFSET` as a cursor; None for anything else."""
    inode, _, offset = text.partition("-")
    digits = inode.isascii() and inode.isdigit() and offset.isascii() and offset.isdigit() and len(text) < 40
    return Cursor(int(inode), int(offset)) if digits else None


def written(cursor: Cursor) -> str:
    """A cursor as `INODE-OFFSET`."""
    return f"{cursor.inode}-{cursor.offset}"


async def stream(library: Library, paths: RunPaths, begin: Cursor, stop: threading.Event) -> AsyncIterator[bytes]:
    """The events of a run from `begin` on, until the server stops or the reader leaves."""
    yield b"retry: 1000\n\n"
    following = _Following(library, paths, begin)
    silent = 0
    while not stop.is_set():
        messages = await run_in_threadpool(following.look)
        silent = 0 if messages else silent + 1
        if silent >= _TICKS_TO_PING:
            messages, silent = [b": still here\n\n"], 0
        for message in messages:
            yield message
        await asyncio.sleep(_SECONDS)


class _Following:
    """What one page has been sent."""

    def __init__(self, library: Library, paths: RunPaths, begin: Cursor) -> None:
        self._library, self._paths = library, paths
        self._metrics, self._machine, self._events = begin, Cursor(), Cursor()
        self._state: dict[str, Any] = {}
        self._first = True

    def look(self) -> list[bytes]:
        """Messages about everything that is new."""
        folder, messages = self._paths.metrics_dir, []
        found = read_from(folder / "metrics.jsonl", self._metrics)
        self._metrics = found.cursor
        if found.restarted:
            messages.append(self._message("restart", {}))
        elif found.records:
            messages.append(self._message("records", [_short(record) for record in most_telling(found.records)]))
        machine = read_from(folder / "system.jsonl", self._machine)
        self._machine = machine.cursor
        if machine.records and not self._first:  # the page itself has loaded the earlier ones
            messages.append(self._message("machine", [_short(record) for record in most_telling(machine.records)]))
        events = read_from(folder / "events.jsonl", self._events)
        self._events = events.cursor
        if events.records:
            shown = found_events(events.records)
            telling = [event.__dict__ for event in shown if event.level != "note"][-20:]
            messages.append(self._message("events", {"marks": marks(shown)[-500:], "alerts": telling, "first": self._first}))
        state = self._now()
        if state != self._state:
            self._state = state
            messages.append(self._message("state", state))
        self._first = False
        return messages

    def _now(self) -> dict[str, Any]:
        row = run_row(self._library.info(self._paths))
        summary = read_summary(self._paths.metrics_dir)
        shown = {name: row[name] for name in ("state", "step", "horizon", "share", "early", "loss", "eval_loss", "tokens")}
        return {**shown, "ends_at": summary.ends_at if summary is not None else None}

    def _message(self, kind: str, content: Any) -> bytes:
        return f"id: {written(self._metrics)}\nevent: {kind}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def most_telling(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most a few of these records: evaluations, those with the lowest and highest loss and the highest gradient norm, and the last."""
    if len(records) <= _MOST_RECORDS:
        return records
    chosen = {len(records) - 1} | set([at for at, record in enumerate(records) if "eval/loss" in record][-2:])
    for name, sign in (("train/loss", -1), ("train/loss", 1), ("train/grad_norm", 1)):
        known = [(sign * value, -at) for at, record in enumerate(records) if (value := number(record.get(name))) is not None]
        chosen |= {-max(known)[1]} if known else set()
    return [records[at] for at in sorted(chosen)]


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """A record with five digits of each value; step, time and tokens whole. What is no number, as null, stands for one not finite."""
    exact = {"step": whole, "t": moment, "train/tokens": number}
    return {name: exact.get(name, _rounded)(value) for name, value in record.items() if name not in _LEFT_OUT}


def _rounded(value: object) -> float | None:
    known = number(value)
    return float(f"{known:.5g}") if known is not None else None
