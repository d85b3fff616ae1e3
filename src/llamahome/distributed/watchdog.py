"""Notices that training makes no progress, says which process is where and since when, with stacks, and ends the process.

The loop calls `enter` when a part of a step begins or ends; a thread looks once a second how long the part has lasted. Only time counts
in which this process was running: a suspended laptop, a stopped process or a clock that jumps raise no alarm.
Cost: under 7 µs per part, measured on a busy machine.
A loop in C code that never releases Python's lock stops this thread, too; then the watchdogs of the other processes report it.
"""

import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from llamahome.config.schema import interval
from llamahome.distributed import failures
from llamahome.distributed.rank_status import RankStatus, processes
from llamahome.errors import MachineError, Problem
from llamahome.units import show_seconds

FACTOR, FLOOR_S = 20.0, 300.0
"""A part of a step hangs after FACTOR times the median step, but not before FLOOR_S."""
LONGER = 12.0
"""An evaluation, a save, writing a profile, and the first steps, in which passes are compiled, may last so many times FLOOR_S: an hour."""
_LONG_FACTOR = 10.0
"""Or so many times the longest part of its kind so far."""
_LONG_PARTS = ("evaluate", "save", "profile")
_FIRST_STEPS, _KEPT_STEPS = 3, 51
_TICK_S, _GRACE_S = 1.0, 5.0
_FRAMES = 8
_WHERE = {
    "": "between two parts of a step",
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


class Parts:
    """The parts of the steps so far: how long they took, and how long the current one may take."""

    def __init__(self, limit_s: float | None = None) -> None:
        """`limit_s` replaces the limit that follows from the steps so far."""
        self._limit_s = limit_s
        self._steps: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._step_s, self._longest = 0.0, dict.fromkeys(_LONG_PARTS, 0.0)
        self._since: float | None = None
        self.current = ""

    def enter(self, part: str, now: float) -> None:
        """Another part begins at `now`, or the same once more. "data" begins a step."""
        begins = self._since is None
        took, self._since = now - (now if self._since is None else self._since), now
        if self.current in _LONG_PARTS:
            self._longest[self.current] = max(self._longest[self.current], took)
        else:
            self._step_s += took
        if part == "data" and self.current != "data" and not begins:
            self._steps.append(self._step_s)
            self._step_s = 0.0
        self.current = part

    @property
    def median_step(self) -> float | None:
        """The median time of a step in seconds; None before a few were made."""
        steps = list(self._steps)
        return median(steps) if len(steps) >= _FIRST_STEPS else None

    def limit(self) -> float:
        """How long the current part may last."""
        usual, floor = self.median_step, self._limit_s or FLOOR_S
        if self.current in _LONG_PARTS:
            return max(LONGER * floor, _LONG_FACTOR * self._longest[self.current])
        if usual is None:
            return LONGER * floor
        return self._limit_s or max(floor, FACTOR * usual)


@dataclass(frozen=True)
class Standing:
    """Where a process is."""

    part: str
    seconds: float
    stack: str


class Watchdog:
    """Watches the main thread of this process; `enter` is called there."""

    def __init__(
        self,
        status: RankStatus,
        log: Path,
        *,
        limit_s: float | None = None,
        end: Callable[[MachineError], None] | None = None,
        tick_s: float = _TICK_S,
    ) -> None:
        """Stacks of all threads are written to `log`. `end` gets the error in place of ending the process."""
        self._status, self._log, self._end, self._tick_s = status, log, end or (lambda error: end_process(error, status)), tick_s
        self._parts = Parts(limit_s)
        self._awake_s, self._entered_at = 0.0, 0.0
        self._closed, self._main = threading.Event(), threading.main_thread().ident
        self._lock = threading.Lock()

    def enter(self, part: str) -> None:
        """Another part begins; an empty name when none does."""
        with self._lock:
            self._parts.enter(part, time.perf_counter())
            self._entered_at = self._awake_s

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch within the block."""
        self.enter("data")
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._closed.set()
            thread.join(_GRACE_S)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._tick_s):
            now = time.monotonic()
            awake, last = min(now - last, 2 * self._tick_s), now
            with self._lock:
                self._awake_s += awake
                part, stuck, limit = self._parts.current, self._awake_s - self._entered_at, self._parts.limit()
            if stuck > limit or (stuck > limit / 2 and self._status.is_asked()):
                self._alarm(Standing(part, stuck, self._main_stack()), late=stuck > limit)
                return

    def _alarm(self, own: Standing, *, late: bool) -> None:
        """Write the stacks and tell the other processes. The first that waits too long, and those that follow it, end."""
        with suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"no progress for {show_seconds(own.seconds)}, {_WHERE.get(own.part, own.part)}; the stacks of all threads:\n")
            file.flush()
            faulthandler.dump_traceback(file)
        standings = {rank: Standing(**each) for rank, each in self._status.exchange_standings(asdict(own), _GRACE_S).items()}
        if not self._closed.is_set():  # it went on in the meantime, and has ended
            self._end(MachineError(verdict(standings, self._status.size, usual=self._parts.median_step, log=self._log)))

    def _main_stack(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        lines = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
        return "\n".join(f"{Path(each.filename).name}:{each.lineno} in {each.name}: {each.line}" for each in lines)


def open_watchdog(timeout: str | None, status: RankStatus, log: Path) -> Watchdog:
    """The watchdog that training.hang_timeout asks for: auto, a time, or None for one that never raises an alarm."""
    limit = None if timeout == "auto" else math.inf if timeout is None else interval(timeout).value
    return Watchdog(status, log, limit_s=limit)


def verdict(standings: Mapping[int, Standing], size: int, *, usual: float | None, log: Path) -> Problem:
    """What to show: which process is where and since when, and the stack of one that the others wait for."""
    silent = [rank for rank in range(size) if rank not in standings]
    by_place: dict[str, list[int]] = {_NO_SIGN: silent} if silent else {}
    for rank, each in sorted(standings.items()):
        by_place.setdefault(_WHERE.get(each.part, each.part), []).append(rank)
    waiting = by_place.pop(_WHERE["exchange"], [])
    if waiting:
        by_place[_WHERE["exchange"]] = waiting  # last, because they wait for the others
    seconds = max(each.seconds for each in standings.values())
    places = [f"{processes(ranks)} {'are' if len(ranks) > 1 else 'is'} {place}" if size > 1 else place for place, ranks in by_place.items()]
    culprit = next((rank for ranks in by_place.values() for rank in ranks if rank in standings and ranks is not waiting), min(standings))
    step = f" (a step takes {show_seconds(usual)})" if usual is not None else ""
    return Problem(
        code="training.hung",
        message=f"no progress for {show_seconds(seconds)}{step}: {'; '.join(places)}",
        where="training.hang_timeout",
        excerpt=f"process {culprit}, innermost last; all threads: {log.with_name(f'rank-{culprit}.log')}\n{standings[culprit].stack}",
        hint="llamahome train-resume latest; if it was only slow, with --set training.hang_timeout='1 h'",
    )


def end_process(error: MachineError, status: RankStatus) -> None:
    """End this process with the exit status of `error`; its launcher shows the error, or else the first process that gave a sign."""
    folder = failures.launch_folder()
    if folder is not None:
        failures.write_failure(error, rank=status.rank, folder=folder)
    elif status.is_first_standing():
        with suppress(OSError):
            os.write(2, ("\n".join(each.render() for each in error.problems) + "\n").encode())
    os._exit(error.exit_status)
