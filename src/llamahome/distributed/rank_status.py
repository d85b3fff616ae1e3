"""Each rank writes its current phase to the shared store, so that a rank whose collective times out can name the ranks that are missing.

Cost: one small message per phase of the program, none per step.
"""

import threading
import time
from collections.abc import Iterable
from datetime import timedelta

from torch._C._distributed_c10d import Store

_GRACE_S = 2.0
"""Ranks that wait for the same missing rank time out within a moment of each other."""
_STORE_TIMEOUT_S = 6.0


class RankStatus:
    """The phases of all ranks. Until `open` is called (one process) only the phase of this rank is known."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._rank, self._size, self.phase = 0, 1, "at the start"

    def open(self, store: Store, *, rank: int, size: int) -> None:
        """Write to `store` from now on."""
        self._store, self._rank, self._size = store, rank, size
        self.enter(self.phase)

    def enter(self, phase: str) -> None:
        """Set the phase of this rank; a phrase such as `in training`."""
        self.phase = phase
        if self._store is not None:
            self._store.set(f"phase/{self._rank}", phase)

    def absent(self) -> list[str]:
        """Describe the ranks that did not time out as well, each with its last phase. Called by a rank whose collective timed out."""
        absent: list[str] = []
        thread = threading.Thread(target=lambda: absent.extend(self._query()), name="rank-status", daemon=True)
        thread.start()
        thread.join(_STORE_TIMEOUT_S)  # over a cut cable the store never answers
        return absent

    def _query(self) -> list[str]:
        if self._store is None:
            return []
        try:
            self._store.set(f"timed-out/{self._rank}", self.phase)
            time.sleep(_GRACE_S)
            missing = [rank for rank in range(self._size) if not self._store.check([f"timed-out/{rank}"])]
            return [f"process {rank} (last seen {self._phase_of(rank)})" for rank in missing]
        except RuntimeError:
            return []  # the store ended with the process that hosted it

    def _phase_of(self, rank: int) -> str:
        key = f"phase/{rank}"
        return self._store.get(key).decode() if self._store is not None and self._store.check([key]) else "before the start"


def missing_ranks(store: Store, *, rank: int, size: int, timeout: timedelta) -> list[int]:
    """Announce this rank in `store` and wait for all others; the ranks that did not arrive in time."""
    store.set(f"arrived/{rank}", str(rank))
    try:
        store.wait([f"arrived/{each}" for each in range(size)], timeout)
    except RuntimeError:
        return [each for each in range(size) if not store.check([f"arrived/{each}"])]
    return []


def processes(ranks: Iterable[int]) -> str:
    """`process 1`, `processes 1, 2 and 5`."""
    names = [str(rank) for rank in ranks]
    many = ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
    return f"process{'es' if len(names) > 1 else ''} {many}"
