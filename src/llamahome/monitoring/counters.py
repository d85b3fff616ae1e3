"""Rates from counters of the machine: network, disk, processors that are held back by a quota or by heat. Linux shows the last two."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from llamahome.distributed.control_groups import quota_periods


class Rates:
    """Rates per second since the previous call; the first call returns none. `root` is the folder that contains proc and sys."""

    def __init__(self, root: Path = Path("/"), *, now: Callable[[], float] = time.perf_counter) -> None:
        self._root, self._now = root, now
        self._heat_counters = _heat_counters(root)
        self._before = (0.0, self._counters())
        self._periods = quota_periods(root)
        self._started = False

    def read(self) -> dict[str, float]:
        """The rates under their metric names. A counter that fell, because a device has gone, is left out once."""
        (then, before), now, counters = self._before, self._now(), self._counters()
        self._before = (now, counters)
        throttled = self._throttled()
        started, self._started = self._started, True
        if not started or now <= then:
            return {}
        rates = {
            name: (value - before[name]) / (now - then) for name, value in counters.items() if name in before and value >= before[name]
        }
        return rates if throttled is None else {**rates, "system/cpu_throttled": throttled}

    def _counters(self) -> dict[str, float]:
        counters: dict[str, float] = {}
        network, disk = psutil.net_io_counters(), psutil.disk_io_counters()
        if network is not None:
            counters |= {"system/net_sent": network.bytes_sent, "system/net_received": network.bytes_recv}
        if disk is not None:
            counters |= {"system/disk_read": disk.read_bytes, "system/disk_written": disk.write_bytes}
        if self._heat_counters:
            counters["system/cpu_thermal"] = float(sum(map(_count, self._heat_counters)))
        return counters

    def _throttled(self) -> float | None:
        """Share of the periods since the last call in which a quota was used up, of the control group where it is highest."""
        before, self._periods = self._periods, quota_periods(self._root)
        shares = [
            (used_up - before[folder][1]) / (periods - before[folder][0])
            for folder, (periods, used_up) in self._periods.items()
            if folder in before and periods > before[folder][0]
        ]
        return max(shares) if shares else None


def _heat_counters(root: Path) -> list[Path]:
    """For each processor package the file that counts how often it slowed down because it was hot."""
    packages: dict[str, Path] = {}
    for cpu in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*")):
        counter, package = cpu / "thermal_throttle/package_throttle_count", cpu / "topology/physical_package_id"
        try:
            packages.setdefault(package.read_text(encoding="ascii"), counter)
            counter.read_text(encoding="ascii")
        except OSError:
            return []
    return list(packages.values())


def _count(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
