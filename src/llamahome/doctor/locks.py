"""Checks whether other processes hold locks on files that a run waits for. Standard library only.

A lock of a process that ended is released by the system, so only a process that lives can be in the way; one that was stopped (Ctrl-Z)
holds its lock for ever.
"""

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llamahome.doctor.checks import Check, passed, warned

_MOST = 500
"""Files that are tried."""


@dataclass(frozen=True)
class Held:
    """A lock that another process holds."""

    path: str
    pid: int | None
    command: str
    stopped: bool
    """Whether that process is suspended."""


def find_locks(folders: Iterable[Path], root: Path = Path("/")) -> tuple[Held, ...]:
    """The locks in these folders that are held; a free lock is taken for an instant to see it."""
    held = []
    for folder in folders:
        places = [each for each in sorted(folder.glob("**/*")) if each.name.endswith((".lock", ".parts")) or each.is_dir()][:_MOST]
        held += [_holder(place, root) for place in places if not _is_free(place)]
    return tuple(held)


def _is_free(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True  # this disk has no locks
    finally:
        os.close(descriptor)


def _holder(path: Path, root: Path) -> Held:
    """The process that /proc/locks names for the file: `1: FLOCK  ADVISORY  WRITE 4711 08:01:131090 0 EOF`."""
    inode = path.stat().st_ino
    try:
        lines = (root / "proc/locks").read_text(encoding="ascii", errors="replace").splitlines()
        numbers = (line.split() for line in lines if "FLOCK" in line and "->" not in line)
        pid = next((int(words[4]) for words in numbers if words[5].rpartition(":")[2] == str(inode)), None)
        status = (root / f"proc/{pid}/status").read_text(encoding="utf-8", errors="replace") if pid else ""
        command = (root / f"proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ").strip() if pid else ""
    except (OSError, ValueError, IndexError):
        return Held(str(path), None, "", False)
    return Held(str(path), pid, command, "State:\tT" in status)


def lock_check(held: tuple[Held, ...]) -> Check:
    """A run waits for each lock that is held."""
    if not held:
        return passed("locks", "no other process prepares data or measures here")
    first = held[0]
    who = f"process {first.pid} ({first.command[:80]})" if first.pid else "another process"
    more = f", and {len(held) - 1} more are held" if len(held) > 1 else ""
    if first.stopped:
        return warned("locks", f"{who} is suspended and holds {first.path}{more}: a run waits for it for ever", f"kill -CONT {first.pid}")
    return warned("locks", f"{who} holds {first.path}{more}: a run on the same data waits until it is done")
