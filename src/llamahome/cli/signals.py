"""What SIGTERM, SIGUSR1 and SIGHUP do while no command of its own listens: the command ends with 130 and removes its temporary files.

Python itself turns only SIGINT into an exception; the others would end the process without clean-up and with a status that says nothing.
While a run trains, training/stop.py listens instead, and the launcher of several processes forwards them.
"""

import os
import signal
from types import FrameType

LEFT = 130
"""The exit status after SIGINT and the other signals: 128 + 2."""
_ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Left(BaseException):
    """A signal asks to end. Not an Exception, so that no library mistakes it for an error of its own."""


def leave_on_signals() -> None:
    """Raise Left at the first signal and exit at the second; a signal that is ignored (`nohup`) stays ignored."""
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    for each in _ENDING:
        if signal.getsignal(each) is _leave:
            signal.signal(each, _leave_now)
    raise Left(signal.Signals(number).name)


def _leave_now(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(LEFT)


def ignore_signals() -> None:
    """The command has come to its result: a signal changes neither it nor the exit status any more."""
    for number in (signal.SIGINT, *_ENDING):
        signal.signal(number, signal.SIG_IGN)
