"""Whether a process moves although it marks no progress: what it and its children have computed and read since a moment.

Asked by the watchdog when a part of the start-up has lasted half its limit and all of it, so a run that goes well pays nothing.
A process that waits for a dead disk, a pipe or a stopped process does neither. One that computes in a loop for ever counts as moving.
"""

import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_LEAST_SHARE = 0.05
"""Of a CPU. A panel that is drawn four times a second takes about a hundredth."""
_LEAST_WANTED = 0.3
"""Of the time. A thread that wakes up four times a second waits for a busy processor for a tenth of it."""
_LEAST_BYTES = 1 << 16
_STATES = {
    psutil.STATUS_STOPPED: "stopped",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "waiting for a disk",
}


@dataclass(frozen=True)
class Movement:
    """Sums over this process and its children since they began."""

    cpu_s: float
    read_bytes: int
    """By calls that read."""
    pages: int
    """Read because memory of a mapped file was used, by this process."""
    wanted_s: Mapping[int, float]
    """By thread: how long it ran or waited for a processor, as on a machine with more work than processors. Only on Linux."""

    def moved_since(self, before: "Movement", seconds: float) -> bool:
        """Whether something was computed or read since `before`, `seconds` ago."""
        computed = self.cpu_s - before.cpu_s >= _LEAST_SHARE * seconds
        wanted = max((each - before.wanted_s.get(thread, 0.0) for thread, each in self.wanted_s.items()), default=0.0)
        computed = computed or wanted >= _LEAST_WANTED * seconds
        return computed or self.read_bytes - before.read_bytes >= _LEAST_BYTES or self.pages > before.pages


def movement() -> Movement:
    """The sums now."""
    cpu_s, read = 0.0, 0
    wanted: dict[int, float] = {}
    for process in _family():
        wanted |= _wanted(process.pid)
        with suppress(psutil.Error):
            times = process.cpu_times()
            cpu_s += times.user + times.system + times.children_user + times.children_system
        with suppress(psutil.Error, AttributeError):  # systems without counters of what a process reads
            read += process.io_counters().read_chars
    return Movement(cpu_s, read, resource.getrusage(resource.RUSAGE_SELF).ru_majflt, wanted)


def _wanted(process: int) -> dict[int, float]:
    """Seconds by thread; not those of the thread that asks."""
    found = {}
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with suppress(OSError, ValueError):
            ran, waited, *_ = path.read_text().split()
            found[int(path.parent.name)] = (int(ran) + int(waited)) / 1e9
    found.pop(threading.get_native_id(), None)
    return found


def children_that_stand_still() -> str:
    """`its process 4711 is stopped`, for each child that the system does not run; empty if there is none."""
    found = []
    for child in _family()[1:]:
        with suppress(psutil.Error):
            if (state := _STATES.get(child.status())) is not None:
                found.append(f"its process {child.pid} is {state}")
    return ", ".join(found)


def end_stopped_children() -> None:
    """End children that are stopped, because they would never notice that this process has ended."""
    for child in _stopped():
        with suppress(psutil.Error):
            child.kill()


def _stopped() -> Iterator[psutil.Process]:
    for child in _family()[1:]:
        with suppress(psutil.Error):
            if child.status() == psutil.STATUS_STOPPED:
                yield child


def _family() -> list[psutil.Process]:
    """The process itself, and then its children and theirs."""
    own = psutil.Process()
    try:
        return [own, *own.children(recursive=True)]
    except psutil.Error:
        return [own]
