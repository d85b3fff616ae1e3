"""Notices that a run makes no progress, says which process is where and since when, with stacks, and ends the process.

The loop calls `enter` when a part of a step begins or ends; a thread looks once a second how long the part has lasted. Only time counts
in which this process was running: a suspended laptop, a stopped process or a clock that jumps raise no alarm. How long it takes to read
data and to load a model follows from their sizes, so these parts have no limit in time: only time counts in which nothing was done, as
progress_marks.py and movement.py tell.
Cost: under 7 µs per part, measured on a busy machine; before the training, also a question to the shared store a second.
A loop in C code that never releases Python's lock stops this thread, too; then the watchdogs of the other processes report it.
"""

import faulthandler
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median

from llamahome.config.schema import interval
from llamahome.distributed import failures
from llamahome.distributed.movement import Movement, children_that_stand_still, end_stopped_children, movement
from llamahome.distributed.rank_status import RankStatus
from llamahome.distributed.standing import IDLE, START_PARTS, WHERE, Standing, stack_of, stacks_of_workers, verdict
from llamahome.errors import MachineError
from llamahome.progress_marks import NO_LIMIT, marks
from llamahome.units import show_seconds

FACTOR, FLOOR_S = 20.0, 300.0
"""A part of a step hangs after FACTOR times the median step and FLOOR_S, and before the training after FLOOR_S without progress."""
LONGER = 12.0
"""An evaluation, a save, writing a profile, and the first steps, in which passes are compiled, may last so many times FLOOR_S: an hour."""
_LONG_FACTOR = 10.0
"""Or so many times the longest part of its kind so far."""
_LONG_PARTS = ("evaluate", "save", "profile")
_MARKED_PARTS = (*START_PARTS, "evaluate")
"""Parts that set marks of progress."""
_FIRST_STEPS, _KEPT_STEPS = 3, 51
_TICK_S, _GRACE_S = 1.0, 5.0


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
        """How long the current part may last, or one that sets marks may last without one."""
        usual, floor = self.median_step, self._limit_s or FLOOR_S
        if self.current == IDLE:
            return math.inf
        if self.current in START_PARTS:
            return floor
        if self.current in _LONG_PARTS:
            return max(LONGER * floor, _LONG_FACTOR * self._longest[self.current])
        if usual is None:
            return LONGER * floor
        return self._limit_s or max(floor, FACTOR * usual)


class Watchdog:
    """Watches the main thread of this process; `enter` is called there."""

    def __init__(
        self,
        status: RankStatus,
        log: Path | None = None,
        *,
        limit_s: float | None = None,
        end: Callable[[MachineError], None] | None = None,
        tick_s: float = _TICK_S,
    ) -> None:
        """Stacks of all threads are written to `log`, if there is one. `end` gets the error in place of ending the process."""
        self._status, self._log, self._end, self._tick_s = status, log, end or (lambda error: end_process(error, status)), tick_s
        self._limit_s = limit_s
        self._parts = Parts(limit_s)
        self._awake_s, self._entered_at = 0.0, 0.0
        self._marks = marks.count
        self._half: tuple[float, Movement] | None = None
        """When a part had lasted half its limit, and what had been done by then."""
        self._closed, self._main = threading.Event(), threading.main_thread().ident or 0
        self._lock = threading.Lock()

    def enter(self, part: str) -> None:
        """Another part begins; an empty name when none does."""
        with self._lock:
            self._parts.enter(part, time.perf_counter())
            self._go_on()

    def _go_on(self) -> None:
        self._entered_at, self._half = self._awake_s, None

    @contextmanager
    def watching(self, part: str = "data") -> Iterator["Watchdog"]:
        """Watch within the block, which begins with `part`."""
        self.enter(part)
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._closed.set()
            thread.join(_GRACE_S)

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """The block is `part`; what it was in before goes on afterwards."""
        before = self._parts.current
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def training(self, log: Path) -> Iterator[None]:
        """The block does the steps of a run; from now on stacks are written to `log`. What follows is not watched."""
        with self._lock:
            self._log, self._parts = log, Parts(self._limit_s)
        self.enter("data")
        try:
            yield
        finally:
            self.enter(IDLE)

    def _run(self) -> None:
        last, asked = time.monotonic(), False
        while not self._closed.wait(self._tick_s):
            now = time.monotonic()
            awake, last = min(now - last, 2 * self._tick_s), now
            with self._lock:
                self._awake_s += awake
                part, limit = self._parts.current, self._parts.limit()
                if part in _MARKED_PARTS and self._marks != marks.count:
                    self._marks = marks.count
                    self._go_on()
                stuck = self._awake_s - self._entered_at
            allowed = marks.allowed if part in _MARKED_PARTS else 1.0
            if stuck > limit * allowed and not self._moves(part):
                self._alarm(self._standing(part, stuck))
                return
            trains = part not in (*START_PARTS, IDLE)
            if not trains and not asked and self._status.is_asked():
                asked = True
                self._status.answer(asdict(self._standing("exchange" if allowed == NO_LIMIT else part, stuck, ends=False)))
            elif trains and stuck > limit / 2 and self._status.is_asked():
                self._alarm(self._standing(part, stuck))
                return
            self._look_back(part, stuck, limit * allowed)

    def _look_back(self, part: str, stuck: float, limit: float) -> None:
        if part in _MARKED_PARTS and stuck > limit / 2 and self._half is None:
            self._half = (stuck, movement())

    def _moves(self, part: str) -> bool:
        """Whether something was done without a mark in the second half of the limit, which then begins again; or nobody has looked yet."""
        if part not in _MARKED_PARTS:
            return False
        if self._half is None:  # a tick was longer than half the limit; `_look_back` comes next
            return True
        since, before = self._half
        now = movement()
        with self._lock:
            moved = now.moved_since(before, self._awake_s - self._entered_at - since)
            if moved:
                self._go_on()
        return moved

    def _standing(self, part: str, stuck: float, *, ends: bool = True) -> Standing:
        starts = part in START_PARTS
        stack = stack_of(self._main) + (stacks_of_workers(self._main) if starts else "")
        return Standing(part, stuck, stack, children_that_stand_still() if starts or part == "data" else "", ends)

    def _alarm(self, own: Standing) -> None:
        """Write the stacks and tell the other processes. The first that waits too long, and those that follow it, end."""
        if self._log is not None:
            with suppress(OSError), self._log.open("a", encoding="utf-8") as file:
                file.write(f"no progress for {show_seconds(own.seconds)}, {WHERE.get(own.part, own.part)}; the stacks of all threads:\n")
                file.flush()
                faulthandler.dump_traceback(file)
        standings = {rank: Standing(**each) for rank, each in self._status.exchange_standings(asdict(own), _GRACE_S).items()}
        if not self._closed.is_set():  # it went on in the meantime, and has ended
            self._end(MachineError(verdict(standings, self._status.size, usual=self._parts.median_step, log=self._log)))


def open_watchdog(timeout: str | None, status: RankStatus) -> Watchdog:
    """The watchdog that training.hang_timeout asks for: auto, a time, or None for one that never raises an alarm. Needs no torch."""
    limit = None if timeout == "auto" else math.inf if timeout is None else interval(timeout).value
    return Watchdog(status, limit_s=limit)


def end_process(error: MachineError, status: RankStatus) -> None:
    """End this process with the exit status of `error`; its launcher shows the error, or else the first process that gave a sign."""
    folder = failures.launch_folder()
    if folder is not None:
        failures.write_failure(error, rank=status.rank, folder=folder)
    elif status.is_first_standing():
        with suppress(OSError):
            os.write(2, ("\n".join(each.render() for each in error.problems) + "\n").encode())
    end_stopped_children()
    os._exit(error.exit_status)
