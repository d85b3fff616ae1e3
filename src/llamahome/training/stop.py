"""Every reason for which a run ends before its last step, and the signals that ask for it.

The first SIGINT, SIGTERM or SIGUSR1 sets a flag that the loop reads after each step; a second SIGINT or SIGTERM leaves at once with 130.
Before training begins a flag set earlier waits, too: the first thing the loop then does is save.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

Reason = Literal["finished", "asked to stop", "no gain", "diverged"]

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_EARLY = "\nstopping with a checkpoint as soon as data and model are loaded; once more leaves at once\n"
_FIRST = "\nstopping after this step with a checkpoint; once more leaves at once\n"
_SECOND = "\nleft at once; the last checkpoint stays\n"


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.training = False
        """Whether steps are being done; only what is said depends on it."""

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals over for the time of the block (only possible in the main thread) and give them back after it."""
        before = {number: signal.signal(number, self._receive) for number in _ASKING}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.asked and number != signal.SIGUSR1:
            _tell(_SECOND)
            os._exit(130)  # not an exception: it would be caught and cleaned up after, which is what the user does not want to wait for
        if not self.asked:
            _tell(_FIRST if self.training else _EARLY)
        self.asked = True


def _tell(text: str) -> None:
    """Write past every buffer and lock, for a signal may come in the middle of a write; Ctrl-C ends the reader of a pipe, too."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, text.encode())
