"""Every reason for which a run ends before its last step, and the signals that ask for it.

The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP sets a flag that the loop reads after each step; a second SIGINT or SIGTERM exits at once
with 130. SIGUSR1 comes from schedulers and SIGHUP from a terminal that closes: more of them change nothing.
A flag that is set before training begins stays set, so the loop saves before its first step.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

Reason = Literal["finished", "asked to stop", "time is up", "no gain"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LEAVING = (signal.SIGINT, signal.SIGTERM)
_EARLY = "\nstopping with a checkpoint as soon as data and model are loaded; once more leaves at once\n"
_FIRST = "\nstopping after this step with a checkpoint; once more leaves at once\n"
_SECOND = "\nleft at once; the last checkpoint stays\n"


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.training = False
        """Whether the loop is running; only the message depends on it."""

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals within the block (only possible in the main thread) and restore their handlers after it."""
        heard = [number for number in _SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.asked and number in _LEAVING:
            _write_to_stderr(_SECOND)
            os._exit(130)  # no exception, because the user does not want to wait for its clean-up
        if not self.asked:
            _write_to_stderr(_FIRST if self.training else _EARLY)
        self.asked = True


def _write_to_stderr(text: str) -> None:
    """Write past every buffer and lock, because a signal may arrive during a write. Ctrl-C also ends the reader of a pipe."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, text.encode())
