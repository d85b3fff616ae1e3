"""Looks at processes by their ids, without ending any."""

import os
import time
from pathlib import Path

import psutil
from tests.support.projects import Project


def children() -> list[int]:
    """Ids of the child processes of this one that have not ended."""
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        try:
            found += [int(word) for word in (task / "children").read_text().split()]
        except FileNotFoundError:
            continue
    return [pid for pid in found if alive(pid)]


def alive(pid: int, *, within: float = 0.0) -> bool:
    """Whether the process lives and has not ended `within` so many seconds."""
    deadline = time.monotonic() + within
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state in "ZX":
            return False
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.05)


def left_of(project: Project, seconds: float = 10) -> list[psutil.Process]:
    """Processes that still run in the project's folder after that time, which the system takes to end a killed one."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()) == project.folder and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.05)
