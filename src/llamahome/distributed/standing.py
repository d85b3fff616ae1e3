"""Where a process stands that makes no progress: its part, since when, with stacks; and the error that tells it of all processes."""

import re
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamahome.distributed.rank_status import processes
from llamahome.errors import Problem
from llamahome.units import show_seconds

START, CHECKPOINT, READ, LOAD, IDLE = "start", "checkpoint", "read", "load", "idle"
START_PARTS = (START, CHECKPOINT, READ, LOAD)
"""What a process does before it trains. IDLE is not watched: the end of a run, and what commands do that do not train."""
WHERE = {
    "": "between two parts of a step",
    START: "preparing the run",
    CHECKPOINT: "reading the checkpoint",
    READ: "reading the data",
    LOAD: "loading the model",
    IDLE: "at work after that",
    "data": "waiting for data",
    "forward": "in a forward pass",
    "backward": "in a backward pass",
    "exchange": "waiting for the other processes",
    "update": "in the update of the weights",
    "evaluate": "in an evaluation",
    "save": "in a save",
    "profile": "writing a profile",
}
_NO_SIGN = "silent: it was stopped, its machine is gone, or C code keeps Python's lock"
_FRAMES = 8
_SHOWN_THREADS = 3
_IDLE_THREAD = re.compile(r"thread\.py:\d+ in _worker: work_item = work_queue\.get\(.*\)$")
"""The end of the stack of a thread of a pool that waits for work."""
_HOUSEKEEPING = ("watchdog", "watch-launcher", "rank-status")


@dataclass(frozen=True)
class Standing:
    """Where a process is."""

    part: str
    seconds: float
    """Since the part began, or since it showed progress."""
    stack: str
    children: str = ""
    """Its child processes that the system does not run."""
    ends: bool = True
    """Whether this process stands still itself and ends; else it only answers."""

    @property
    def where(self) -> str:
        """For people."""
        return WHERE.get(self.part, self.part) + (f" ({self.children})" if self.children else "")


def stack_of(thread: int) -> str:
    """The innermost calls of a thread, the innermost last."""
    frame = sys._current_frames().get(thread)
    lines = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
    return "\n".join(f"{Path(each.filename).name}:{each.lineno} in {each.name}: {each.line}" for each in lines)


def stacks_of_workers(main: int) -> str:
    """The stacks of the other threads that work, in a process whose main thread waits for them; equal ones once."""
    found: dict[str, list[str]] = {}
    for thread in threading.enumerate():
        if thread.ident not in (None, main) and not thread.daemon and thread.name not in _HOUSEKEEPING:
            found.setdefault(stack_of(thread.ident or 0), []).append(thread.name)
    busy = [(stack, names) for stack, names in found.items() if not _IDLE_THREAD.search(stack)]
    return "".join(f"\nin {', '.join(names)}:\n{stack}" for stack, names in busy[:_SHOWN_THREADS])


def verdict(standings: Mapping[int, Standing], size: int, *, usual: float | None = None, log: Path | None = None) -> Problem:
    """What to show: which process is where and since when, and the stack of one that the others wait for.

    `usual` is the median time of a step, `log` has the stacks of all threads; neither is there before the training.
    """
    silent = [rank for rank in range(size) if rank not in standings]
    by_place: dict[str, list[int]] = {_NO_SIGN: silent} if silent else {}
    for rank, each in sorted(standings.items(), key=lambda item: (not item[1].ends, item[0])):
        by_place.setdefault(each.where, []).append(rank)
    waiting = by_place.pop(WHERE["exchange"], [])
    if waiting:
        by_place[WHERE["exchange"]] = waiting  # last, because they wait for the others
    seconds = max(each.seconds for each in standings.values() if each.ends)
    places = [f"{processes(ranks)} {'are' if len(ranks) > 1 else 'is'} {place}" if size > 1 else place for place, ranks in by_place.items()]
    culprit = next((rank for ranks in by_place.values() for rank in ranks if rank in standings and ranks is not waiting), min(standings))
    step = f" (a step takes {show_seconds(usual)})" if usual is not None else ""
    starts = all(each.part in START_PARTS for each in standings.values() if each.ends)
    threads = f"; all threads: {log.with_name(f'rank-{culprit}.log')}" if log is not None else ""
    again = "the same command again" if starts else "llamahome train-resume latest"
    return Problem(
        code="training.hung",
        message=f"no progress for {show_seconds(seconds)}{step}: {'; '.join(places)}",
        where="training.hang_timeout",
        excerpt=f"process {culprit}, innermost last{threads}\n{standings[culprit].stack}",
        hint=f"{again}; if it was only slow, with --set training.hang_timeout='1 h'",
    )
