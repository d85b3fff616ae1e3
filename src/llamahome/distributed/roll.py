"""Who is where: every process notes in the common store what it is doing, so that a wait in vain can name those who did not come.

Cost: one small message per phase of the program, none per step.
"""

import threading
import time
from collections.abc import Iterable
from datetime import timedelta

from torch._C._distributed_c10d import Store

_GRACE_S = 2.0
"""Those who wait in vain give up within a moment of each other."""
_PATIENCE_S = 6.0


class Roll:
    """The notes of all processes; without a store (one process) it does nothing."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._rank, self._size, self.phase = 0, 1, "at the start"

    def open(self, store: Store, *, rank: int, size: int) -> None:
        """Begin to write into `store`."""
        self._store, self._rank, self._size = store, rank, size
        self.enter(self.phase)

    def enter(self, phase: str) -> None:
        """Note what this process does from here on."""
        self.phase = phase
        if self._store is not None:
            self._store.set(f"at/{self._rank}", phase)

    def absent(self) -> list[str]:
        """Called by a process that waited in vain: those that do not wait as well, each with where it was seen last."""
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.extend(self._ask()), name="roll", daemon=True)
        asking.start()
        asking.join(_PATIENCE_S)  # over a cable that is cut, the store never answers
        return found

    def _ask(self) -> list[str]:
        if self._store is None:
            return []
        try:
            self._store.set(f"waited/{self._rank}", self.phase)
            time.sleep(_GRACE_S)
            away = [rank for rank in range(self._size) if not self._store.check([f"waited/{rank}"])]
            return [f"process {rank} (last seen {self._seen(rank)})" for rank in away]
        except RuntimeError:
            return []  # the store went away with the process that kept it

    def _seen(self, rank: int) -> str:
        key = f"at/{rank}"
        return self._store.get(key).decode() if self._store is not None and self._store.check([key]) else "before the start"


def arrive(store: Store, *, rank: int, size: int, within: timedelta) -> list[int]:
    """Sign in and wait for the others; the ranks that did not arrive in time."""
    store.set(f"arrived/{rank}", str(rank))
    try:
        store.wait([f"arrived/{each}" for each in range(size)], within)
    except RuntimeError:
        return [each for each in range(size) if not store.check([f"arrived/{each}"])]
    return []


def processes(ranks: Iterable[int]) -> str:
    """Numbers as words: `process 1`, `processes 1, 2 and 5`."""
    names = [str(rank) for rank in ranks]
    many = ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
    return f"process{'es' if len(names) > 1 else ''} {many}"
