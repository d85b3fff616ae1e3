"""The limits that control groups set for this process: memory and processors, of cgroup version 1 and 2. Standard library only.

Every level above the process is read, because the tightest limit counts and inside a container only the outermost may be visible.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_FILE_PAGES = ("inactive_file", "active_file")
"""Lists of pages that the system takes back when it needs memory: in memory.stat."""


def memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes of each control group that has a limit. Pages of files, also mapped ones, do not count as used.

    `root` is the folder that contains proc and sys.
    """
    for controllers, group in _groups(root):
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for folder in _upwards(top, group):
            limit_and_use = _limit_and_use(folder, names)
            if limit_and_use is not None:
                yield limit_and_use


def processor_quota(root: Path) -> float | None:
    """The smallest quota of all control groups of this process, in CPUs; None if there is none."""
    quotas = []
    for controllers, group in _groups(root):
        if not controllers:
            quotas += [_version_2(folder) for folder in _upwards(root / "sys/fs/cgroup", group)]
        elif "cpu" in controllers.split(","):
            for mount in {"cpu", controllers}:
                quotas += [_version_1(folder) for folder in _upwards(root / "sys/fs/cgroup" / mount, group)]
    return min((quota for quota in quotas if quota is not None), default=None)


def quota_periods(root: Path) -> dict[str, tuple[int, int]]:
    """By folder of each control group with a processor quota: its periods so far, and those in which the quota was used up."""
    found = {}
    for controllers, group in _groups(root):
        mounts = {""} if not controllers else {"cpu", controllers} if "cpu" in controllers.split(",") else set()
        for folder in (folder for mount in mounts for folder in _upwards(root / "sys/fs/cgroup" / mount, group)):
            words = read_words(folder / "cpu.stat")
            statistics = dict(zip(words[::2], words[1::2], strict=False))
            if int(statistics.get("nr_periods", 0)):
                found[str(folder)] = int(statistics["nr_periods"]), int(statistics.get("nr_throttled", 0))
    return found


def _groups(root: Path) -> Iterator[tuple[str, str]]:
    """The controllers and the path of each group of this process; version 2 names no controllers."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        yield controllers, group


def _upwards(mount: Path, group: str) -> list[Path]:
    """The folders of a group and of all its parents."""
    inner = PurePosixPath(group.lstrip("/"))
    return [mount / part for part in (inner, *inner.parents)]


def _limit_and_use(folder: Path, names: tuple[str, str]) -> tuple[int, int] | None:
    limit_file, use_file = names
    try:
        limit, used = (folder / limit_file).read_text(encoding="ascii").strip(), int((folder / use_file).read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    values = dict(zip(statistics[::2], statistics[1::2], strict=False))
    prefix = "total_" if any(name.startswith("total_") for name in values) else ""  # of version 1, which counts groups below it there
    cache = sum(int(values.get(f"{prefix}{name}", 0)) for name in _FILE_PAGES)
    if not limit.isdigit() or int(limit) == 0:  # "max" in v2; v1 writes a huge number instead
        return None
    return int(limit), max(0, used - cache)


def _version_2(folder: Path) -> float | None:
    words = read_words(folder / "cpu.max")
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _version_1(folder: Path) -> float | None:
    quota, period = read_words(folder / "cpu.cfs_quota_us"), read_words(folder / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def read_words(path: Path) -> list[str]:
    """The words of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
