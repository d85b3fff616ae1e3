"""How many processors and cores this process may really use: what its affinity mask and its control group allow, not what is built in.

And how torch is to behave on them, which is settled before it is imported.
"""

import ctypes
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path, PurePosixPath

_SPINS = "1000"
"""Rounds that a thread of torch waits awake for the others before it sleeps. measured on two processors (docs/log.md): with two other busy
processes 4 to 10 times the speed of the default of 300,000, which burns what a descheduled thread needs to go on."""

_KERNEL_CACHES, _KERNELS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), "64"
"""Prepared matrix products that torch and oneDNN keep, with their working memory, 1,024 each unless told. measured (docs/log.md): every new
number of tokens added 25 MB until gigabytes were kept that no later step used; with 64 memory stays flat at the same speed."""

_TRIM, _MAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt."""
_KEPT_BYTES = 2**30
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def share_processors(environment: MutableMapping[str, str]) -> None:
    """Make torch's threads let others run; call it before torch is imported. What the user set (OMP_WAIT_POLICY, GOMP_SPINCOUNT) stands."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)


def bound_caches(environment: MutableMapping[str, str]) -> None:
    """Let torch keep few of the kernels that it makes for each shape; call it before torch is imported. What the user set stands."""
    for name in _KERNEL_CACHES:
        environment.setdefault(name, _KERNELS)


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let memory that a step frees stay with this process for the next step: the system would have to clear every page of it again.

    measured (docs/log.md): 0.1 of 2.7 processor seconds of a step of 1,536 tokens. Only glibc is told, and only if the user told its
    allocator nothing.
    """
    if sys.platform != "linux" or any(name in environment for name in _CHOICES):
        return False
    told = getattr(ctypes.CDLL(None), "mallopt", None)
    return told is not None and all(told(option, _KEPT_BYTES) for option in (_MAP, _TRIM))


def usable_cpus(*, root: Path = Path("/")) -> int:
    """At least 1. A container's quota of 1.5 processors counts as 1: a second thread would be stopped half of the time.

    `root` is where /proc and /sys are looked for.
    """
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def usable_cores(*, root: Path = Path("/")) -> int:
    """At least 1: as usable_cpus, but two processors of one core (SMT) count once, for matrix products fill a core with one thread."""
    if sys.platform != "linux":
        return usable_cpus(root=root)
    cores = {_siblings(root, number) for number in os.sched_getaffinity(0)}
    return min(len(cores), usable_cpus(root=root))


def _siblings(root: Path, number: int) -> str:
    """The processors of the core of this one, as the system writes them; itself where it does not say."""
    folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
    return next((" ".join(words) for name in ("core_cpus_list", "thread_siblings_list") if (words := _words(folder / name))), str(number))


def _quota(root: Path) -> float | None:
    """The tightest quota of the control groups that hold this process, in processors; None where there is none."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            quotas += [_version_2(folder) for folder in _upwards(root / "sys/fs/cgroup", group)]
        elif "cpu" in controllers.split(","):
            for mount in {"cpu", controllers}:
                quotas += [_version_1(folder) for folder in _upwards(root / "sys/fs/cgroup" / mount, group)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _upwards(mount: Path, group: str) -> list[Path]:
    """The folders of a group and of all groups around it; inside a container only the outermost may be visible."""
    inner = PurePosixPath(group.lstrip("/"))
    return [mount / part for part in (inner, *inner.parents)]


def _version_2(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _version_1(folder: Path) -> float | None:
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
