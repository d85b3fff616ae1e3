"""Marks of progress while data is read and a model is loaded: the code that reads and loads sets them, and the watchdog looks at them.

A mark is set for each block, row, part of a store or tensor that is done, so a slow disk that still delivers is told from a dead one.
Cost: about 0.1 µs a mark. Any thread may set one.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NO_LIMIT = math.inf
"""For what has a limit of its own: downloads, whose connections time out, and collectives (distributed.timeout)."""
FLUSHING = 12.0
"""For operations that cannot show their progress: to flush a file of any size to a disk, and measurements of another process."""

PATIENT = 2.0
"""For the wait for a process that may be of the same run: it then reports first that it stands still."""


class Marks:
    """How far this process has come, and what it waits for that may last longer."""

    def __init__(self) -> None:
        self.count = 0
        """Grows with every mark; two marks at the same moment may count as one."""
        self._lock = threading.Lock()
        self._allowed: list[float] = []

    def advance(self) -> None:
        """Something was done."""
        self.count += 1

    @contextmanager
    def allowing(self, factor: float) -> Iterator[None]:
        """What the block does may last `factor` times as long without a mark. The end of the block is a mark."""
        with self._lock:
            self._allowed.append(factor)
        try:
            yield
        finally:
            with self._lock:
                self._allowed.remove(factor)
            self.advance()

    @property
    def allowed(self) -> float:
        """The largest factor of the blocks that some thread is in; 1 outside of them."""
        with self._lock:
            return max(self._allowed, default=1.0)


marks = Marks()
"""Of this process."""
