"""What runs there are and how they did, read from their files alone; a run that works is not disturbed. No torch.

Listing reads status.json and the end of metrics.jsonl of each run; showing one run reads its metrics once. A torn last line, which
a process leaves that died while writing or is writing now, is left out; other lines that cannot be read are counted.
"""

import json
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

from llamahome.errors import Problem, UsageError
from llamahome.monitoring.status import LOST_AFTER_SECONDS, read_status
from llamahome.rundir import NEWEST, RUNS, RunPaths, first_command, nearby, open_run

ShownState = Literal["running", "finished", "stopped", "failed", "lost"]

_TAIL_BYTES = 65536
"""Enough for the last 100 records of metrics.jsonl."""
_STAMP = re.compile(r"\d{8}-\d{6}")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One run in a list."""

    run_id: str
    folder: Path
    state: ShownState
    """`lost`: it says that it runs, but its process is gone or has been silent for 30 s."""
    step: int | None
    horizon: int | None
    started: float
    """Unix seconds."""
    heartbeat: float | None
    """Unix seconds of the last sign of life."""
    loss: float | None
    eval_loss: float | None
    tokens: int | None


@dataclass(frozen=True)
class Series:
    """The records of one .jsonl file, in order, and how many lines in it could not be read."""

    records: list[dict[str, Any]]
    damaged: int


def read_records(path: Path) -> Series:
    """Every whole record; an empty series when there is no such file. A torn last line is not counted as damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Series([], 0)
    return _parse(content)


def read_series(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl as numbers; what was not finite is nan."""
    return [
        {name: math.nan if value is None else value for name, value in record.items() if value is None or isinstance(value, int | float)}
        for record in read_records(path).records
    ]


def _parse(content: bytes) -> Series:
    lines = content.split(b"\n")
    records, damaged = [], 0
    for line in lines[:-1]:  # what follows the last newline is torn
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            damaged += 1
    return Series(records, damaged)


def list_runs(root: Path = RUNS) -> list[RunInfo]:
    """Every run under `root`, the newest run, and those that --output put elsewhere and whose status names their folder; oldest first."""
    folders = {folder.resolve(): folder for folder in _run_folders(root)}
    runs = [describe_run(open_run(folder)) for folder in folders.values()]
    return sorted(runs, key=lambda run: (run.started, run.run_id))


def _run_folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (folder for folder in root.iterdir() if _is_run(folder))
    if _is_run(NEWEST):
        yield NEWEST.resolve()
    metrics = RunPaths(root, "any").metrics_dir.parent
    if metrics.is_dir():
        for status in metrics.glob("*/status.json"):
            folder = read_status(status).get("folder")
            if isinstance(folder, str) and _is_run(Path(folder)) and open_run(Path(folder)).run_id == status.parent.name:
                yield Path(folder)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def describe_run(paths: RunPaths) -> RunInfo:
    """State and last figures of one run."""
    status = read_status(paths.metrics_dir / "status.json")
    last = _last_values(paths.metrics_dir / "metrics.jsonl")
    step = max((value for value in (status.get("step"), last.get("step")) if isinstance(value, int)), default=None)
    tokens = last.get("train/tokens")
    return RunInfo(
        run_id=paths.run_id,
        folder=nearby(paths.root),
        state=_state(status),
        step=step,
        horizon=status.get("horizon"),
        started=_started(paths),
        heartbeat=status.get("t"),
        loss=last.get("train/loss"),
        eval_loss=last.get("eval/loss"),
        tokens=None if tokens is None else int(tokens),
    )


def _last_values(metrics: Path) -> dict[str, Any]:
    """The newest value of each metric in the end of the file."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            content = file.read()
    except FileNotFoundError:
        return {}
    values: dict[str, Any] = {}
    for record in _parse(content).records:  # the first line may be cut, and is then no record
        values |= {name: value for name, value in record.items() if value is not None}
    return values


def _state(status: dict[str, Any]) -> ShownState:
    said = status.get("state")
    if said in ("finished", "stopped", "failed"):
        return said  # type: ignore[no-any-return]
    heartbeat = status.get("t")
    if said != "running" or not isinstance(heartbeat, int | float) or time.time() - heartbeat > LOST_AFTER_SECONDS:
        return "lost"
    here = status.get("host") == socket.gethostname()
    return "lost" if here and not _is_alive(status.get("pid")) else "running"


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _started(paths: RunPaths) -> float:
    stamp = _STAMP.match(paths.run_id)
    if stamp:
        try:
            return datetime.strptime(stamp[0], "%Y%m%d-%H%M%S").timestamp()
        except ValueError:
            pass  # digits that are no date: a name that the user chose
    try:
        return paths.config.stat().st_mtime
    except OSError:
        return 0.0


def find_run(name: str, root: Path = RUNS) -> RunPaths:
    """The run that `name` means: `latest`, a folder (also a checkpoint in it), a run id, or a part that only one run id has.

    UsageError `run.unknown` or `run.ambiguous` otherwise.
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
        shown = "\n".join(similar[:-11:-1])
        message = f"{name!r} is a part of {len(similar)} run ids" + (", the newest ten of which are" if len(similar) > 10 else "")
        raise UsageError(
            Problem(code="run.ambiguous", message=message, where="RUN", excerpt=shown, hint=f"llamahome runs show {similar[-1]}")
        )
    raise UsageError(Problem(code="run.unknown", message=f"there is no run {name!r}", where="RUN", hint=_nearest(name, list(runs))))


def _latest(root: Path) -> RunPaths:
    if _is_run(NEWEST):
        return open_run(NEWEST)
    runs = list_runs(root)
    if not runs:
        raise UsageError(Problem(code="run.unknown", message="there is no run yet", where=str(root), hint=first_command()))
    return open_run(runs[-1].folder)


def _nearest(name: str, run_ids: list[str]) -> str:
    if not run_ids:
        return first_command()
    words = {_STAMP.sub("", run_id).strip("-"): run_id for run_id in run_ids} | {run_id: run_id for run_id in run_ids}
    close = get_close_matches(name, list(words), n=1, cutoff=0.5)
    return f"llamahome runs show {words[close[0]]}" if close else "llamahome runs list"
