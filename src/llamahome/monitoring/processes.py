"""Names a process so that another process with the same number is not taken for it: numbers are used again, times of birth are not."""

from dataclasses import dataclass

import psutil

_SECONDS_APART = 1.0
"""The time of birth is counted from the time of the boot, which a clock that is set may move."""


@dataclass(frozen=True)
class ProcessId:
    """One process of this machine."""

    pid: int
    born: float
    """Unix seconds."""


def identify(pid: int) -> ProcessId | None:
    """The process that has this number now; None if there is none."""
    try:
        return ProcessId(pid, psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


def is_alive(process: ProcessId) -> bool:
    """Whether the process itself runs: not one that got its number later, and not one that has ended and waits for its parent."""
    try:
        found = psutil.Process(process.pid)
        return bool(abs(found.create_time() - process.born) < _SECONDS_APART and found.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, ValueError, OverflowError):
        return False


def belongs_to(pid: int, process: ProcessId) -> bool:
    """Whether the number is that of the process, which must run, or of one that it started, itself or through others."""
    if not is_alive(process):
        return False
    try:
        return pid == process.pid or any(parent.pid == process.pid for parent in psutil.Process(pid).parents())
    except (psutil.Error, ValueError, OverflowError):
        return False


def is_python_module(process: ProcessId, module: str) -> bool:
    """Whether the process runs `python -m module`."""
    try:
        words = psutil.Process(process.pid).cmdline()
    except psutil.Error:
        return False
    return is_alive(process) and any(words[at : at + 2] == ["-m", module] for at in range(len(words)))
