"""What the machine is doing: a daemon thread that samples it into system.jsonl, and how much memory is free.

Shares lie between 0 and 1. A container's limit counts as the machine's: cgroup v2 and v1 are read at every level above the process.
A sample costs 0.4 ms (measured).
"""

import contextlib
import importlib
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from llamahome.monitoring.sinks import AppendFile, DiskTrouble, json_line

_LOG = logging.getLogger(__name__)


def process_memory() -> tuple[int, int]:
    """Bytes of this process that are in memory now, and the most that ever were."""
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
    """Memory that this process may still take: what the machine has free, or what the tightest cgroup limit leaves."""
    rooms = (limit - used for limit, used in _cgroup_limits(root))
    return max(0, min([int(psutil.virtual_memory().available), *rooms]))


def used_memory_share(root: Path = Path("/")) -> float:
    """Share of the memory in use, of the machine or of the tightest cgroup limit, whichever is fuller."""
    shares = (used / limit for limit, used in _cgroup_limits(root))
    return float(max([psutil.virtual_memory().percent / 100, *shares]))


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every cgroup above this process that has a limit; file cache that can be dropped is not used."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = Path(group.strip("/"))
        for level in (folder, *folder.parents):  # inside a container only the top may be visible
            found = _limit_and_use(top / level, names)
            if found is not None:
                yield found


def _limit_and_use(folder: Path, names: tuple[str, str, str]) -> tuple[int, int] | None:
    limit_file, use_file, cache_name = names
    try:
        limit, used = (folder / limit_file).read_text(encoding="ascii").strip(), int((folder / use_file).read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    cache = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(cache_name, "0")
    if not limit.isdigit() or int(limit) == 0:  # "max" in v2; v1 writes a huge number instead
        return None
    return int(limit), max(0, used - int(cache))


class ResourceSampler:
    """Samples the machine every `every` seconds from `start` to `stop`; `disk` is a path on the disk to watch.

    Trouble with the file goes to `warn`, by default to the log: the Recorder tells people of a full disk.
    """

    def __init__(self, path: Path, every: float, *, warn: Callable[[str], None] = _LOG.warning, disk: Path | None = None) -> None:
        self._every = every
        self._disk = disk or path.parent
        self._file = AppendFile(path, DiskTrouble(warn))
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._network: tuple[float, int, int] | None = None
        self._gpu = _gpu_readings()
        self._latest: dict[str, float] = {}
        self._process = psutil.Process()

    def start(self) -> None:
        """Begin; the first sample comes after one interval."""
        psutil.cpu_percent(None)  # its share is of the time since the call before
        self._network_rates()
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="llamahome-resources", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample, end the thread, wait for it, and close the file."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._file.close()

    def latest(self) -> dict[str, float]:
        """The newest sample; empty before the first."""
        return self._latest

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self._every)
            self._latest = self._sample()
            self._file.append(json_line({"t": round(time.time(), 3), **self._latest}))

    def _sample(self) -> dict[str, float]:
        sample = {
            "system/cpu": psutil.cpu_percent(None) / 100,
            "system/ram": used_memory_share(),
            "memory/rss": float(self._process.memory_info().rss),
            **self._network_rates(),
        }
        with contextlib.suppress(OSError):  # a disk that went away is told where something is written to it
            sample["system/disk"] = psutil.disk_usage(str(self._disk)).percent / 100
        for name, read in self._gpu.items():
            value = read()
            if value is not None:
                sample[name] = value
        return sample

    def _network_rates(self) -> dict[str, float]:
        counters, now = psutil.net_io_counters(), time.perf_counter()
        if counters is None:
            return {}
        before, self._network = self._network, (now, counters.bytes_sent, counters.bytes_recv)
        if before is None or now <= before[0]:
            return {}
        seconds = now - before[0]
        return {
            "system/net_sent": (counters.bytes_sent - before[1]) / seconds,
            "system/net_received": (counters.bytes_recv - before[2]) / seconds,
        }


def _gpu_readings() -> dict[str, Callable[[], float | None]]:
    """What this process's GPU tells of itself: empty without one, and without what the driver's library cannot read."""
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

    def guarded(read: Callable[[], float]) -> Callable[[], float | None]:
        def reading() -> float | None:
            try:
                return read()
            except (driver_error, RuntimeError):
                return None

        return reading

    return {
        "system/gpu_util": guarded(lambda: gpu.utilization() / 100),
        "system/gpu_power": guarded(lambda: gpu.power_draw() / 1000),
        "system/gpu_temperature": guarded(lambda: float(gpu.temperature())),
    }
