"""Measures free memory, and samples the machine into system.jsonl from a daemon thread.

Shares are between 0 and 1. Memory limits of containers are respected: cgroup v2 and v1 are read at every level above the process.
A sample takes 0.4 ms (measured).
"""

import contextlib
import importlib
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from llamahome.distributed.control_groups import memory_limits
from llamahome.monitoring.sinks import AppendFile, DiskTrouble, json_line

_LOG = logging.getLogger(__name__)


def process_memory() -> tuple[int, int]:
    """Resident memory of this process in bytes: now, and its peak."""
    resident = int(psutil.Process().memory_info().rss)
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):  # ru_maxrss would include the parent's memory at the fork
                return resident, max(resident, int(line.split()[1]) * 1024)
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident, max(resident, peak if sys.platform == "darwin" else peak * 1024)


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still allocate: free memory of the machine, or what is left under the tightest cgroup limit."""
    left = (limit - used for limit, used in memory_limits(root))
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may use in all: the machine's memory, or the tightest cgroup limit."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in memory_limits(root))])


def used_memory_share(root: Path = Path("/")) -> float:
    """Share of memory in use: of the machine or of a cgroup limit, whichever is higher."""
    shares = (used / limit for limit, used in memory_limits(root))
    return float(max([psutil.virtual_memory().percent / 100, *shares]))


class ResourceSampler:
    """Samples the machine every `every` seconds between `start` and `stop`; `disk` is a path on the disk to measure.

    Write errors go to `warn`, by default to the log, because the Recorder already reports a full disk to the user.
    """

    def __init__(self, path: Path, every: float, *, warn: Callable[[str], None] = _LOG.warning, disk: Path | None = None) -> None:
        self._every = every
        self._disk = disk or path.parent
        self._file = AppendFile(path, DiskTrouble(warn))
        self._stop_requested = threading.Event()
        self._thread: threading.Thread | None = None
        self._network: tuple[float, int, int] | None = None
        self._gpu_readers = _gpu_readers()
        self._latest: dict[str, float] = {}
        self._process = psutil.Process()

    def start(self) -> None:
        """Start the thread; the first sample comes after one interval."""
        psutil.cpu_percent(None)  # cpu_percent measures from the previous call
        self._network_rates()
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

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop_requested.wait(self._every)
            self._latest = self._sample()
            self._file.append(json_line({"t": round(time.time(), 3), **self._latest}))

    def _sample(self) -> dict[str, float]:
        sample = {
            "system/cpu": psutil.cpu_percent(None) / 100,
            "system/ram": used_memory_share(),
            "memory/rss": float(self._process.memory_info().rss),
            **self._network_rates(),
        }
        with contextlib.suppress(OSError):  # writing to a disk that has been removed reports the error
            sample["system/disk"] = psutil.disk_usage(str(self._disk)).percent / 100
        for name, read in self._gpu_readers.items():
            value = read()
            if value is not None:
                sample[name] = value
        return sample

    def _network_rates(self) -> dict[str, float]:
        counters, now = psutil.net_io_counters(), time.perf_counter()
        if counters is None:
            return {}
        previous, self._network = self._network, (now, counters.bytes_sent, counters.bytes_recv)
        if previous is None or now <= previous[0]:
            return {}
        seconds = now - previous[0]
        return {
            "system/net_sent": (counters.bytes_sent - previous[1]) / seconds,
            "system/net_received": (counters.bytes_recv - previous[2]) / seconds,
        }


def _gpu_readers() -> dict[str, Callable[[], float | None]]:
    """Functions that read a metric of this process's GPU, by metric; empty without a GPU or without nvidia-ml-py."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return {}
    gpu: Any = torch.get_device_module(torch.accelerator.current_accelerator())
    if not hasattr(gpu, "utilization"):
        return {}
    try:
        driver_error = importlib.import_module("pynvml").NVMLError
    except ImportError:
        return {}

    def none_on_error(read: Callable[[], float]) -> Callable[[], float | None]:
        def read_or_none() -> float | None:
            try:
                return read()
            except (driver_error, RuntimeError):
                return None

        return read_or_none

    return {
        "system/gpu_util": none_on_error(lambda: gpu.utilization() / 100),
        "system/gpu_power": none_on_error(lambda: gpu.power_draw() / 1000),
        "system/gpu_temperature": none_on_error(lambda: float(gpu.temperature())),
    }
