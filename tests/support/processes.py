"""Looks at processes by their ids, without ending any."""

import os
import time
from pathlib import Path


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
