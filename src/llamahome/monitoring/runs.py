"""Lists and finds runs by their files, also while they train. No torch.

A list reads status.json and the end of metrics.jsonl of each run. A torn last line is ignored, because the process may still be writing
it or was killed while it wrote; other lines that cannot be parsed are counted.
"""

import math
import os
import re
import shlex
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, Literal

from llamahome.durable import read_object
from llamahome.errors import Problem, UsageError
from llamahome.known_runs import ambiguous, known_runs, newest_run, run_folders, runs_called
from llamahome.monitoring.readings import moment, number, whole
from llamahome.monitoring.series import parse
from llamahome.monitoring.status import LOST_AFTER_SECONDS
from llamahome.rundir import RUNS, RunPaths, first_command, nearby, open_run

ShownState = Literal["running", "finished", "stopped", "failed", "lost"]

_TAIL_BYTES = 65536
"""Holds the last 100 records of metrics.jsonl."""
_EVALUATION, _EVALUATION_BYTES, _BLOCK_BYTES = b'"eval/loss"', 16 << 20, 1 << 20
"""What the last evaluation is looked for by, in how much of the end of metrics.jsonl (25,000 records), and how much is read at once."""
_TIMESTAMP = re.compile(r"\d{8}-\d{6}")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """State and last metrics of a run."""

    run_id: str
    folder: Path
    state: ShownState
    """`lost`: status.json says "running", but the process is gone or its last heartbeat is more than 30 s old."""
    step: int | None
    horizon: int | None
    ended_early: Literal["time is up", "no gain"] | None
    """Why a finished run did not do all its steps; None if it did, or if it has not finished."""
    started: float
    """Unix seconds."""
    heartbeat: float | None
    """Unix seconds of the last heartbeat."""
    loss: float | None
    eval_loss: float | None
    tokens: int | None


@dataclass(frozen=True)
class Series:
    """The records of one .jsonl file in order, and the number of lines that could not be parsed."""

    records: list[dict[str, Any]]
    damaged: int


def read_records(path: Path) -> Series:
    """Read every complete record of `path`; none if the file is missing, and a damaged line if it cannot be read.

    A torn last line does not count as damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Series([], 0)
    except OSError:
        return Series([], 1)
    return _whole_records(content)


def numbers_of(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The numbers of each record; null becomes nan."""
    return [
        {name: _or_nan(value) for name, value in record.items() if value is None or isinstance(value, int | float)} for record in records
    ]


def _or_nan(value: float | None) -> float:
    found = number(value)
    return math.nan if found is None else found


def without_nan(value: Any) -> Any:
    """`value` with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    return [without_nan(part) for part in value] if isinstance(value, list) else value


def _whole_records(content: bytes) -> Series:
    return Series(*parse(content[: content.rfind(b"\n") + 1]))  # what follows has no newline yet


def list_runs(root: Path = RUNS) -> list[RunInfo]:
    """List the runs under `root`, the newest run, and the runs elsewhere (--output) that their status.json locates; oldest first."""
    return sorted((describe_run(paths) for paths in run_paths(root)), key=lambda run: (run.started, run.run_id))


def run_paths(root: Path = RUNS) -> list[RunPaths]:
    """The paths of the same runs, in no order; none of their metrics is read."""
    return [open_run(folder) for folder in run_folders(root) if _has_settings(folder)]


def _has_settings(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def describe_run(paths: RunPaths) -> RunInfo:
    """Read the state and the last metrics of one run."""
    status = read_object(paths.metrics_dir / "status.json")
    last = _last_values(paths.metrics_dir / "metrics.jsonl")
    saved = [number for number, _ in paths.checkpoints()[-1:]]
    step = max((count for value in (status.get("step"), last.get("step"), *saved) if (count := whole(value)) is not None), default=None)
    tokens = number(last.get("train/tokens"))
    return RunInfo(
        run_id=paths.run_id,
        folder=nearby(paths.root),
        state=_state(status) if status or not paths.final.is_dir() else "finished",  # a folder that came without its metrics
        step=step,
        horizon=whole(status.get("horizon")),
        ended_early=_ended_early(status),
        started=_started(paths),
        heartbeat=moment(status.get("t")),
        loss=number(last.get("train/loss")),
        eval_loss=number(last.get("eval/loss")),
        tokens=None if tokens is None else int(tokens),
    )


def describe_energy(paths: RunPaths) -> float | None:
    """The kWh that a run has used so far, as far as they were measured; None if nothing measured them."""
    return number(_last_values(paths.metrics_dir / "metrics.jsonl").get("energy/kwh"))


def _last_values(metrics: Path) -> dict[str, Any]:
    """The last value of each metric, from the end of the file, and that of eval/loss from before it if it is not there."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            content = file.read()
            values: dict[str, Any] = {}
            for record in _whole_records(content).records:  # a first line that is cut off does not parse
                values |= {name: value for name, value in record.items() if value is not None}
            if "eval/loss" not in values and size > _TAIL_BYTES:
                values |= _last_evaluation(file, size)
    except OSError:
        return {}
    return values


def _last_evaluation(file: BinaryIO, size: int) -> dict[str, Any]:
    """The eval/loss of the last evaluation that has one, read backwards; empty if there is none near the end."""
    after, end = b"", size
    while end > max(0, size - _EVALUATION_BYTES):
        begin = max(0, end - _BLOCK_BYTES)
        file.seek(begin)
        content = file.read(end - begin) + after
        whole_lines = content.find(b"\n") + 1 if begin else 0
        for line in reversed(content[whole_lines:].split(b"\n")):
            if _EVALUATION in line and (found := parse(line)[0]) and number(found[0].get("eval/loss")) is not None:
                return {"eval/loss": found[0]["eval/loss"]}
        after, end = content[:whole_lines], begin
    return {}


def _state(status: dict[str, Any]) -> ShownState:
    state = status.get("state")
    if state in ("finished", "stopped", "failed"):
        return state  # type: ignore[no-any-return]
    heartbeat = moment(status.get("t"))
    if state != "running" or heartbeat is None or time.time() - heartbeat > LOST_AFTER_SECONDS:
        return "lost"
    on_this_host = status.get("host") == socket.gethostname()
    return "lost" if on_this_host and not is_alive(status.get("pid"), heartbeat) else "running"


def _ended_early(status: dict[str, Any]) -> Literal["time is up", "no gain"] | None:
    reason = status.get("reason") if status.get("state") == "finished" else None
    return reason if reason in ("time is up", "no gain") else None


def is_alive(pid: object, heartbeat: float) -> bool:
    """Whether the process `pid` of this machine, which wrote a heartbeat at that time, still exists; not a younger one of its number."""
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    import psutil  # most states need no process list

    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= heartbeat)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _started(paths: RunPaths) -> float:
    timestamp = _TIMESTAMP.match(paths.run_id)
    if timestamp:
        try:
            return datetime.strptime(timestamp[0], "%Y%m%d-%H%M%S").timestamp()
        except (ValueError, OverflowError):
            pass  # not a date: the user chose a name of digits
    try:
        return paths.config.stat().st_mtime
    except OSError:
        return 0.0


def find_run(name: str, root: Path = RUNS, *, typed: Sequence[str] = ("show",)) -> RunPaths:
    """Find a run by `latest`, its folder or a checkpoint in it, its run id, or a part that only one run id contains.

    `typed` is what stood behind `llamahome runs`, the verb first. Raises UsageError `run.unknown` or `run.ambiguous`.
    """
    if name == "latest":
        return _latest(root)
    folder = Path(name)
    if folder.name.startswith("checkpoint-") or folder.name == "final":
        folder = folder.parent
    if _has_settings(folder):
        return open_run(folder)
    runs = {run_id: folder for run_id, folder in known_runs(root).items() if _has_settings(folder)}
    if name in runs:
        return open_run(runs[name])
    similar = runs_called(name, runs)
    if len(similar) == 1:
        return open_run(runs[similar[0]])
    if similar:
        raise UsageError(ambiguous(name, similar, hint=_with_name(similar[-1], name, typed)))
    raise UsageError(Problem(code="run.unknown", message=f"there is no run {name!r}", where="RUN", hint=_nearest(name, list(runs), typed)))


def _with_name(run_id: str, name: str, typed: Sequence[str]) -> str:
    """The command that was typed, with `run_id` in place of `name`."""
    verb, *words = typed if name in typed[1:] else (*typed, name)
    return shlex.join(["llamahome", "runs", verb, *(run_id if word == name else word for word in words)])


def _latest(root: Path) -> RunPaths:
    newest = newest_run(root)
    if newest is None:
        raise UsageError(Problem(code="run.unknown", message="there is no run yet", where=str(root), hint=first_command()))
    return open_run(newest)


def _nearest(name: str, run_ids: list[str], typed: Sequence[str]) -> str:
    if not run_ids:
        return first_command()
    by_name = {_TIMESTAMP.sub("", run_id).strip("-"): run_id for run_id in run_ids} | {run_id: run_id for run_id in run_ids}
    close = get_close_matches(name, list(by_name), n=1, cutoff=0.5)
    return _with_name(by_name[close[0]], name, typed) if close else "llamahome runs list"
