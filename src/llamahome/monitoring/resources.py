"""Measures free memory, and samples the machine into system.jsonl from a daemon thread.

Shares are between 0 and 1. Memory limits of containers are respected: cgroup v2 and v1 are read at every level above the process.
Every process of a run has a sampler: the first one of each machine measures the machine, each one itself and its GPU.
"""

import contextlib
import logging
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil

from llamahome.distributed.control_groups import memory_limits, processor_quota
from llamahome.monitoring.counters import Rates
from llamahome.monitoring.energy import ProcessorEnergy
from llamahome.monitoring.nvml import GpuReader, open_gpu
from llamahome.monitoring.sinks import AppendFile, DiskTrouble, json_line

_LOG = logging.getLogger(__name__)


_EVERY_ENERGY_SECONDS = 60.0
"""The longest time between two readings of the counters of energy, which wrap around after some minutes."""


def process_memory() -> tuple[int, int]:
    """Resident memory of this process in bytes: now, and its peak."""
    status = _own_status()
    resident, peak = _kilobytes(status, b"VmRSS:"), _kilobytes(status, b"VmHWM:")
    if resident is not None and peak is not None:  # ru_maxrss would include the parent's memory at the fork
        return resident, max(resident, peak)
    resident = int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident, max(resident, peak if sys.platform == "darwin" else peak * 1024)


_recent: tuple[float, int, int] = (-math.inf, 0, 0)
"""When recent_memory read the memory of this process, and what it read."""
_RECENT_SECONDS = 0.1


def recent_memory() -> tuple[int, int]:
    """The same, at most a tenth of a second old: a read takes up to 100 µs in a container, which short steps would feel."""
    global _recent
    now = time.monotonic()
    if now - _recent[0] >= _RECENT_SECONDS:
        _recent = (now, *process_memory())
    return _recent[1:]


def _own_status() -> bytes:
    """What Linux tells of this process; nothing elsewhere. Read in one call, because a run asks with every line of metrics."""
    try:
        descriptor = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 16384)
    finally:
        os.close(descriptor)


def _kilobytes(status: bytes, name: bytes) -> int | None:
    """A figure of /proc/self/status in bytes; None if the system does not tell."""
    begin = status.find(b"\n" + name)
    return int(status[begin + 1 + len(name) :].split(None, 1)[0]) * 1024 if begin >= 0 else None


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still allocate: free memory of the machine, or what is left under the tightest cgroup limit."""
    left = (limit - used for limit, used in memory_limits(root))
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may use in all: the machine's memory, or the tightest cgroup limit."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in memory_limits(root))])


def memory_share_and_limit(root: Path) -> tuple[float, float]:
    """The share of memory in use, and the memory that there is in bytes, of the machine or under its tightest limit."""
    machine, limits = psutil.virtual_memory(), list(memory_limits(root))
    share = max([machine.percent / 100, *(used / limit for limit, used in limits)])
    return float(share), float(min([machine.total, *(limit for limit, _ in limits)]))


class ResourceSampler:
    """Samples the machine every `every` seconds between `start` and `stop`; `disk` is a path on the disk to measure.

    Write errors go to `warn`, by default to the log, because the Recorder already reports a full disk to the user. Without
    `whole_machine` only this process and its GPU are measured. `labels` stand in every record, such as the rank.
    """

    def __init__(
        self,
        path: Path,
        every: float,
        *,
        warn: Callable[[str], None] = _LOG.warning,
        disk: Path | None = None,
        whole_machine: bool = True,
        labels: Mapping[str, object] = MappingProxyType({}),
        root: Path = Path("/"),
    ) -> None:
        self._every = every
        self._disk = disk or path.parent
        self._labels = labels
        self._root = root
        self._file = AppendFile(path, DiskTrouble(warn))
        self._stop_requested = threading.Event()
        self._thread: threading.Thread | None = None
        self._cpus = float(processor_quota(root) or os.cpu_count() or 1)
        self._rates = Rates(root) if whole_machine else None
        self._energy = ProcessorEnergy(root / "sys/class/powercap") if whole_machine else None
        self._gpu: GpuReader | None = open_gpu()
        self._joules: float | None = None
        self._power: tuple[float, float] | None = None
        """(time, joules of the processors) at the last sample."""
        self._latest: dict[str, float] = {}
        self._process = psutil.Process()

    def start(self) -> None:
        """Start the thread; the first sample comes after one interval."""
        psutil.cpu_percent(None)  # cpu_percent measures from the previous call
        self._process.cpu_percent(None)
        if self._rates is not None:
            self._rates.read()
        self._count_energy()
        self._stop_requested.clear()
        self._thread = threading.Thread(target=self._run, name="llamahome-resources", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample, join the thread and close the file."""
        self._stop_requested.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._file.close()

    def latest(self) -> dict[str, float]:
        """The newest sample; empty before the first one."""
        return self._latest

    def joules(self) -> float | None:
        """Energy since the start: of the machine's processors and memory, and of this process's GPU; None if nothing measures it."""
        return self._joules

    def _run(self) -> None:
        stopping, due = False, time.monotonic() + self._every
        while not stopping:
            stopping = self._stop_requested.wait(max(0.0, min(due - time.monotonic(), _EVERY_ENERGY_SECONDS)))
            if not stopping and time.monotonic() < due:
                self._count_energy()
            else:
                due = time.monotonic() + self._every
                self._latest = {**self._sample(), **self._count_energy()}
                self._file.append(json_line({"t": round(time.time(), 3), **self._labels, **self._latest}))

    def _sample(self) -> dict[str, float]:
        resident, swap = int(self._process.memory_info().rss), _kilobytes(_own_status(), b"VmSwap:")
        sample = {"memory/rss": float(resident), "system/cpu_process": self._process.cpu_percent(None) / 100}
        if swap is not None:
            sample["memory/swap"] = float(swap)
        if self._rates is not None:
            share, limit = memory_share_and_limit(self._root)
            sample |= {
                "system/cpu": psutil.cpu_percent(None) / 100,
                "system/cpus": self._cpus,
                "system/ram": share,
                "system/ram_limit": limit,
                **self._rates.read(),
            }
            with contextlib.suppress(OSError):  # writing to a disk that has been removed reports the error
                usage = psutil.disk_usage(str(self._disk))
                sample |= {"system/disk": usage.percent / 100, "system/disk_free": float(usage.free)}
        if self._gpu is not None:
            sample |= self._gpu.read()
        return sample

    def _count_energy(self) -> dict[str, float]:
        """Read the counters of energy; the power of the processors since the last reading, where there are any."""
        counted, now = self._energy.joules() if self._energy is not None else None, time.monotonic()
        parts = [joules for joules in (counted, self._gpu.joules() if self._gpu is not None else None) if joules is not None]
        self._joules = sum(parts) if parts else None
        if counted is None:
            return {}
        before, self._power = self._power, (now, counted)
        return {} if before is None or now <= before[0] else {"system/cpu_power": (counted - before[1]) / (now - before[0])}
