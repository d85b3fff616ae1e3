"""Lists and finds runs by their files, also while they train. No torch.

A list reads status.json and the end of metrics.jsonl of each run. A torn last line is ignored, because the process may still be writing
it or was killed while it wrote; other lines that cannot be parsed are counted.
"""

import math
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from llamahome.durable import read_object
from llamahome.errors import Problem, UsageError
from llamahome.monitoring.series import parse
from llamahome.monitoring.status import LOST_AFTER_SECONDS
from llamahome.rundir import NEWEST, RUNS, RunPaths, first_command, nearby, open_run, sweep_of

ShownState = Literal["running", "finished", "stopped", "failed", "lost"]

_TAIL_BYTES = 65536
"""Holds the last 100 records of metrics.jsonl."""
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
    """Read every complete record of `path`; none if the file is missing. A torn last line does not count as damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Series([], 0)
    return _whole_records(content)


def numbers_of(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The numbers of each record; null becomes nan."""
    return [
        {name: math.nan if value is None else value for name, value in record.items() if value is None or isinstance(value, int | float)}
        for record in records
    ]


def _whole_records(content: bytes) -> Series:
    return Series(*parse(content[: content.rfind(b"\n") + 1]))  # what follows has no newline yet


def list_runs(root: Path = RUNS) -> list[RunInfo]:
    """List the runs under `root`, the newest run, and the runs elsewhere (--output) that their status.json locates; oldest first."""
    return sorted((describe_run(paths) for paths in run_paths(root)), key=lambda run: (run.started, run.run_id))


def run_paths(root: Path = RUNS) -> list[RunPaths]:
    """The paths of the same runs, in no order; none of their metrics is read."""
    folders = {folder.resolve(): folder for folder in _run_folders(root)}
    return [open_run(folder) for folder in folders.values()]


def _run_folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (folder for folder in root.iterdir() if _is_run(folder))
    if _is_run(NEWEST):
        yield NEWEST.resolve()
    metrics = RunPaths(root, "any").metrics_dir.parent
    if metrics.is_dir():
        for status in metrics.glob("*/status.json"):
            folder = read_object(status).get("folder")
            if isinstance(folder, str) and _is_run(Path(folder)) and open_run(Path(folder)).run_id == status.parent.name:
                yield Path(folder)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def describe_run(paths: RunPaths) -> RunInfo:
    """Read the state and the last metrics of one run."""
    status = read_object(paths.metrics_dir / "status.json")
    last = _last_values(paths.metrics_dir / "metrics.jsonl")
    step = max((value for value in (status.get("step"), last.get("step")) if isinstance(value, int)), default=None)
    tokens = _number(last.get("train/tokens"))
    horizon = status.get("horizon")
    return RunInfo(
        run_id=paths.run_id,
        folder=nearby(paths.root),
        state=_state(status),
        step=step,
        horizon=horizon if isinstance(horizon, int) else None,
        started=_started(paths),
        heartbeat=_number(status.get("t")),
        loss=_number(last.get("train/loss")),
        eval_loss=_number(last.get("eval/loss")),
        tokens=None if tokens is None else int(tokens),
    )


def describe_energy(paths: RunPaths) -> float | None:
    """The kWh that a run has used so far, as far as they were measured; None if nothing measured them."""
    return _number(_last_values(paths.metrics_dir / "metrics.jsonl").get("energy/kwh"))


def _number(value: object) -> float | None:
    """None for what is no number, because a damaged file may hold anything."""
    return value if isinstance(value, int | float) else None


def _last_values(metrics: Path) -> dict[str, Any]:
    """The last value of each metric, from the end of the file."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            content = file.read()
    except FileNotFoundError:
        return {}
    values: dict[str, Any] = {}
    for record in _whole_records(content).records:  # a first line that is cut off does not parse
        values |= {name: value for name, value in record.items() if value is not None}
    return values


def _state(status: dict[str, Any]) -> ShownState:
    state = status.get("state")
    if state in ("finished", "stopped", "failed"):
        return state  # type: ignore[no-any-return]
    heartbeat = status.get("t")
    if state != "running" or not isinstance(heartbeat, int | float) or time.time() - heartbeat > LOST_AFTER_SECONDS:
        return "lost"
    on_this_host = status.get("host") == socket.gethostname()
    return "lost" if on_this_host and not _is_alive(status.get("pid")) else "running"


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    import psutil  # most states need no process list

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _started(paths: RunPaths) -> float:
    timestamp = _TIMESTAMP.match(paths.run_id)
    if timestamp:
        try:
            return datetime.strptime(timestamp[0], "%Y%m%d-%H%M%S").timestamp()
        except ValueError:
            pass  # not a date: the user chose a name of digits
    try:
        return paths.config.stat().st_mtime
    except OSError:
        return 0.0


def find_run(name: str, root: Path = RUNS) -> RunPaths:
    """Find a run by `latest`, its folder or a checkpoint in it, its run id, or a part that only one run id contains.

    Raises UsageError `run.unknown` or `run.ambiguous`.
    """
    if name == "latest":
        return _latest(root)
    folder = Path(name)
    if folder.name.startswith("checkpoint-") or folder.name == "final":
        folder = folder.parent
    if _is_run(folder):
        return open_run(folder)
    runs = {run.run_id: run for run in list_runs(root)}
    if name in runs:
        return open_run(runs[name].folder)
    similar = [run_id for run_id in runs if name and name in run_id]
    if len(similar) == 1:
        return open_run(runs[similar[0]].folder)
    if similar:
        newest = "\n".join(similar[:-11:-1])
        message = f"{len(similar)} run ids contain {name!r}" + ("; the newest ten are" if len(similar) > 10 else "")
        raise UsageError(
            Problem(code="run.ambiguous", message=message, where="RUN", excerpt=newest, hint=f"llamahome runs show {similar[-1]}")
        )
    raise UsageError(Problem(code="run.unknown", message=f"there is no run {name!r}", where="RUN", hint=_nearest(name, list(runs))))


def _latest(root: Path) -> RunPaths:
    if _is_run(NEWEST):
        return open_run(NEWEST)
    runs = [run for run in list_runs(root) if sweep_of(run.folder) is None]
    if not runs:
        raise UsageError(Problem(code="run.unknown", message="there is no run yet", where=str(root), hint=first_command()))
    return open_run(runs[-1].folder)


def _nearest(name: str, run_ids: list[str]) -> str:
    if not run_ids:
        return first_command()
    by_name = {_TIMESTAMP.sub("", run_id).strip("-"): run_id for run_id in run_ids} | {run_id: run_id for run_id in run_ids}
    close = get_close_matches(name, list(by_name), n=1, cutoff=0.5)
    return f"llamahome runs show {by_name[close[0]]}" if close else "llamahome runs list"
