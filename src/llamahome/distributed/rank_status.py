"""Each rank writes its current phase to the shared store, so that a rank whose collective times out can name the ranks that are missing.

Cost: one small message per phase of the program, none per step. When a rank makes no progress, all ranks write where they stand.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_Answer = TypeVar("_Answer")
_GRACE_S = 2.0
"""Ranks that wait for the same missing rank time out within a moment of each other."""
_STORE_TIMEOUT_S = 6.0
_POLL_S = 0.1
_ASKED = "standings"


class RankStatus:
    """The phases of all ranks. Until `open` is called (one process) only the phase of this rank is known."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self.rank, self.size, self.phase = 0, 1, "at the start"
        self._standings: dict[int, Any] = {}

    def open(self, store: "Store", *, rank: int, size: int) -> None:
        """Write to `store` from now on."""
        self._store, self.rank, self.size = store, rank, size
        self.enter(self.phase)

    def enter(self, phase: str) -> None:
        """Set the phase of this rank; a phrase such as `in training`."""
        self.phase = phase
        if self._store is not None:
            self._store.set(f"phase/{self.rank}", phase)

    def absent(self) -> list[str]:
        """Describe the ranks that did not time out as well, each with its last phase. Called by a rank whose collective timed out."""
        return _answer_of(self._query, _STORE_TIMEOUT_S) or []

    def is_asked(self) -> bool:
        """Whether another rank makes no progress and asks where this one stands. Called while nothing else is to be done."""
        store = self._store
        return bool(store is not None and _answer_of(lambda: store.check([_ASKED]), _STORE_TIMEOUT_S))

    def exchange_standings(self, own: dict[str, Any], seconds: float) -> dict[int, dict[str, Any]]:
        """Write where this rank stands, ask the others, and wait up to `seconds` for all; the standings by rank, at least the own one."""
        self._standings = {self.rank: own}
        _answer_of(lambda: self._collect(own, time.monotonic() + seconds), seconds + _STORE_TIMEOUT_S)
        return self._standings

    def answer(self, own: dict[str, Any]) -> None:
        """Write where this rank stands, for another one that asks, and go on."""
        store = self._store
        if store is not None:
            _answer_of(lambda: store.set(f"standing/{self.rank}", json.dumps(own)), _STORE_TIMEOUT_S)

    def is_first_standing(self) -> bool:
        """Whether no rank before this one ends after the last `exchange_standings`."""
        return min(rank for rank, each in self._standings.items() if each["ends"]) == self.rank

    def _collect(self, own: dict[str, Any], deadline: float) -> None:
        store = self._store
        if store is None:
            return
        store.set(f"standing/{self.rank}", json.dumps(own))
        store.set(_ASKED, "1")
        while len(self._standings) < self.size:
            missing = [rank for rank in range(self.size) if rank not in self._standings]
            found = {rank: json.loads(store.get(f"standing/{rank}")) for rank in missing if store.check([f"standing/{rank}"])}
            self._standings = {**self._standings, **found}
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)

    def _query(self) -> list[str]:
        if self._store is None:
            return []
        self._store.set(f"timed-out/{self.rank}", self.phase)
        time.sleep(_GRACE_S)
        missing = [rank for rank in range(self.size) if not self._store.check([f"timed-out/{rank}"])]
        return [f"process {rank} (last seen {self._phase_of(rank)})" for rank in missing]

    def _phase_of(self, rank: int) -> str:
        key = f"phase/{rank}"
        return self._store.get(key).decode() if self._store is not None and self._store.check([key]) else "before the start"


def _answer_of(ask: Callable[[], _Answer], seconds: float) -> _Answer | None:
    """What `ask` returns; None if it takes longer, as over a cut cable, or if the store has ended with the process that hosted it."""
    answers: list[_Answer] = []

    def run() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=run, name="rank-status", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def missing_ranks(store: "Store", *, rank: int, size: int, timeout: timedelta) -> list[int]:
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
