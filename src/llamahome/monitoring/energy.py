"""Measures the energy of processors with the counters that Linux shows as RAPL (/sys/class/powercap), where they can be read.

Only measured energy counts: without readable counters there is no figure, and nothing is estimated. Most systems let only root read the
counters (CVE-2020-8694). They are those of the machine, other programs included, and they wrap around, so they must be read every few
minutes. Of a package its own counter is taken, which holds its parts; the memory's is added where it is a zone of its own. Some laptops
show a package twice, as a register of the processor (intel-rapl) and in memory (intel-rapl-mmio); it is counted once.
"""

from dataclasses import dataclass
from pathlib import Path

JOULES_PER_KWH = 3.6e6
_POWERCAP = Path("/sys/class/powercap")


@dataclass
class _Zone:
    counter: Path
    range_uj: int
    """The counter begins again at 0 after this value."""
    last_uj: int


class ProcessorEnergy:
    """Adds up the energy that the counters have counted since this object was made."""

    def __init__(self, folder: Path = _POWERCAP) -> None:
        self._zones = _zones(folder, "intel-rapl:*") or _zones(folder, "intel-rapl-mmio:*")
        self._joules = 0.0

    def joules(self) -> float | None:
        """Energy so far in joules; None if no counter can be read."""
        for zone in self._zones:
            now = _number(zone.counter)
            if now is not None:
                passed = now - zone.last_uj
                self._joules += (passed if passed >= 0 else passed + zone.range_uj + 1) / 1e6
                zone.last_uj = now
        return self._joules if self._zones else None


def _zones(folder: Path, name: str) -> list[_Zone]:
    return [zone for path in sorted(folder.glob(name)) if _counts(path) and (zone := _open_zone(path)) is not None]


def _counts(zone: Path) -> bool:
    """Whether the zone is a package or memory: parts of a package are counted with it, and psys would count everything twice."""
    try:
        name = (zone / "name").read_text(encoding="ascii").strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _open_zone(path: Path) -> _Zone | None:
    now, largest = _number(path / "energy_uj"), _number(path / "max_energy_range_uj")
    return None if now is None or largest is None else _Zone(path / "energy_uj", largest, now)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
