"""Checks processors, memory, limits, locale and clock of this machine or container. Standard library only."""

import locale
import os
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llamahome.distributed.control_groups import memory_limits, processor_quota
from llamahome.distributed.processors import usable_cores, usable_cpus
from llamahome.doctor.checks import Check, failed, passed, warned
from llamahome.units import show_bytes

_RELEASED = 1_793_491_200
"""1 November 2026, shortly before this version was written: a clock before that is wrong."""
_DAY = 86_400
_YEARS = 10 * 365 * _DAY
_NEEDED_MEMORY, _TIGHT_MEMORY = 2**30, 2 * 2**30
"""Bytes. measured: Python with torch, transformers and peft takes 0.5 GiB, a LoRA run of the starter 1.6 GiB (docs/Performance.md)."""
_SWAPPED = 512 * 2**20
_FEW_FILES, _FILES = 128, 1024
"""Open files: importing torch opens dozens of libraries one after another; each rank, shard and worker keeps some open."""
_LARGEST_FILE = 2**30


@dataclass(frozen=True)
class Machine:
    """What the system says of itself."""

    cpus: int
    """All that the machine has."""
    usable_cpus: int
    usable_cores: int
    quota: float | None
    """CPUs that the control group gives."""
    memory: int
    """Bytes, as are the next five."""
    free_memory: int
    memory_limit: int | None
    """The tightest of the control groups."""
    free_below_limit: int | None
    swap: int
    swapped: int
    open_files: int
    """Limit of this process; resource.RLIM_INFINITY is none."""
    most_open_files: int
    """To which a user may raise it."""
    file_size: int
    address_space: int
    filesystem_encoding: str
    text_encoding: str
    now: float
    """Seconds since 1970."""
    newest_file: tuple[str, float] | None
    """Name and time of the latest file of the project's folder."""


def read_machine(root: Path = Path("/"), *, folder: Path = Path()) -> Machine:
    """Look at this machine; `root` is the folder that contains proc and sys."""
    sizes = _meminfo(root)
    limits = list(memory_limits(root))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(
        cpus=os.cpu_count() or 1,
        usable_cpus=usable_cpus(root=root),
        usable_cores=usable_cores(root=root),
        quota=processor_quota(root),
        memory=sizes.get("MemTotal", 0),
        free_memory=sizes.get("MemAvailable", 0),
        memory_limit=min((limit for limit, _ in limits), default=None),
        free_below_limit=min((limit - used for limit, used in limits), default=None),
        swap=sizes.get("SwapTotal", 0),
        swapped=sizes.get("SwapTotal", 0) - sizes.get("SwapFree", 0),
        open_files=soft,
        most_open_files=hard,
        file_size=resource.getrlimit(resource.RLIMIT_FSIZE)[0],
        address_space=resource.getrlimit(resource.RLIMIT_AS)[0],
        filesystem_encoding=sys.getfilesystemencoding().lower(),
        text_encoding=locale.getpreferredencoding(False).lower(),
        now=time.time(),
        newest_file=_newest(folder),
    )


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes; on systems without it, what sysconf knows."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"MemTotal": total, "MemAvailable": total}
    parts = (line.replace(":", "").split() for line in lines)
    return {words[0]: int(words[1]) * 1024 for words in parts if len(words) >= 2 and words[1].isdigit()}


def _newest(folder: Path) -> tuple[str, float] | None:
    """The latest file of the project's own folders, two levels deep."""
    places = [folder / name for name in (".config", "output", "output/runs", "data", "data/training/raw")]
    times = []
    for place in places:
        try:
            times += [(str(path), path.stat().st_mtime) for path in place.iterdir()]
        except OSError:
            continue
    return max(times, key=lambda each: each[1], default=None)


def processor_check(machine: Machine) -> Check:
    """How many processors a run may use, and whether a quota stops it part of the time."""
    detail = f"{machine.usable_cores} of {machine.usable_cpus} usable CPUs are cores of their own; the machine has {machine.cpus}"
    if machine.quota is not None and machine.quota < 1:
        return warned("processors", f"the container may use {machine.quota:g} of a CPU, so even one thread is stopped part of the time")
    if machine.quota is not None and machine.quota < machine.cpus:
        return warned("processors", f"the container may use {machine.quota:g} of the machine's {machine.cpus} CPUs; {detail}")
    if machine.usable_cpus < machine.cpus:
        return passed("processors", f"{detail} (the affinity of this process leaves the rest to others)")
    return passed("processors", detail)


def memory_checks(machine: Machine) -> Iterator[Check]:
    """Whether there is memory to start, whether a container has less than the machine shows, and whether the machine swaps."""
    free = machine.free_memory if machine.free_below_limit is None else max(0, min(machine.free_memory, machine.free_below_limit))
    detail = f"{show_bytes(free)} free of {show_bytes(machine.memory)}"
    if free < _NEEDED_MEMORY:
        yield failed("memory", f"{detail}; Python, torch and a small model need {show_bytes(_NEEDED_MEMORY)}")
    elif free < _TIGHT_MEMORY:
        help_ = "export LLAMAHOME_TRAINING__MICRO_BATCH_TOKENS=512 LLAMAHOME_TRAINING__GRADIENT_CHECKPOINTING=true"
        yield warned("memory", f"{detail}, which is tight for a model of 135 M weights", help_)
    else:
        yield passed("memory", detail)
    limit = machine.memory_limit
    if limit is not None and limit < machine.memory:
        text = f"the container may use {show_bytes(limit)} of the machine's {show_bytes(machine.memory)}; beyond that a process is killed"
        yield warned("memory-limit", text)
    else:
        yield passed("memory-limit", "no control group limits memory below the machine's")
    if machine.swapped > _SWAPPED:
        yield warned("swap", f"{show_bytes(machine.swapped)} of {show_bytes(machine.swap)} swap are in use: what is swapped out is slow")
    else:
        yield passed("swap", f"{show_bytes(machine.swapped)} in use" if machine.swap else "there is no swap")


def limit_checks(machine: Machine) -> Iterator[Check]:
    """The limits of `ulimit`: open files, size of a file, address space."""
    files, most = machine.open_files, machine.most_open_files
    unlimited = resource.RLIM_INFINITY
    wanted = 4096 if most == unlimited else min(4096, most)
    help_ = f"ulimit -n {wanted}" if wanted >= _FILES else None
    if files == unlimited or files >= _FILES:
        yield passed("open-files", "no limit" if files == unlimited else f"up to {files:,}")
    else:
        make = failed if files < _FEW_FILES else warned
        yield make("open-files", f"a process may open {files:,} files; with many data files, shards or processes it needs more", help_)
    if machine.file_size != unlimited and machine.file_size < _LARGEST_FILE:
        text = f"a file may grow to {show_bytes(machine.file_size)}, so larger checkpoints cannot be written"
        yield failed("file-size", text, "ulimit -f unlimited")
    if machine.address_space != unlimited and machine.address_space < 2 * machine.memory:
        text = f"a process may map {show_bytes(machine.address_space)}; torch maps more than it uses"
        yield warned("address-space", text, "ulimit -v unlimited")


def locale_check(machine: Machine) -> Check:
    """Whether file names and texts are UTF-8."""
    if machine.filesystem_encoding.replace("-", "") == machine.text_encoding.replace("-", "") == "utf8":
        return passed("locale", "file names and texts are UTF-8")
    text = (
        f"file names are {machine.filesystem_encoding}, texts {machine.text_encoding}: other libraries misread texts that are not English"
    )
    return warned("locale", text, "export PYTHONUTF8=1")


def clock_check(machine: Machine) -> Check:
    """Whether the time is possible: run ids, the newest checkpoint and certificates of downloads depend on it."""
    shown = time.strftime("%Y-%m-%d %H:%M", time.gmtime(machine.now))
    if machine.now < _RELEASED:
        text = f"it says {shown} UTC, before this version was released: downloads and the order of runs will fail"
        return failed("clock", text, "sudo timedatectl set-ntp true" if shutil.which("timedatectl") else None)
    if machine.now > _RELEASED + _YEARS:
        return warned("clock", f"it says {shown} UTC, long after this version was released: certificates may count as expired")
    if machine.newest_file is not None and machine.newest_file[1] > machine.now + _DAY:
        name, changed = machine.newest_file
        dated = time.strftime("%Y-%m-%d", time.gmtime(changed))
        text = f"it says {shown} UTC, but {name} is dated {dated}: one of them is wrong"
        return warned("clock", text, f"touch {shlex.quote(name)}")
    return passed("clock", f"{shown} UTC")


def home_check(environment: Mapping[str, str]) -> Check:
    """Whether HOME is a folder that can be written: caches of every library go there."""
    home = environment.get("HOME")
    if not home:
        return warned(
            "home", "HOME is not set, so libraries do not know where their caches are", "mkdir -p /tmp/home && export HOME=/tmp/home"
        )
    try:
        with tempfile.TemporaryFile(dir=home):
            return passed("home", home)
    except OSError as error:
        text = f"{home} cannot be written: {error.strerror or error}; caches of libraries and downloads from the hub go there"
        return warned("home", text, "mkdir -p /tmp/home && export HOME=/tmp/home")
