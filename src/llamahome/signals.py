"""What the signals that ask to end do while no command of its own listens: the command ends with 130 and removes its temporary files.

SIGINT, SIGTERM, SIGUSR1 and SIGHUP raise an exception. It may be lost in a library that runs Python inside C (a destructor, an import of
an extension module): the signal is remembered, and `leave_if_asked` raises again before the long work of a command starts.
While a run trains, training/stop.py listens instead, and the launcher of several processes forwards them.
"""

import os
import signal
from types import FrameType

LEFT = 130
"""The exit status after SIGINT and the other signals: 128 + 2."""
_ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


_asked: list[str] = []
"""Names of the signals that asked to leave, in order."""


class Left(BaseException):
    """A signal asks to end. Not an Exception, so that no library mistakes it for an error of its own."""


def leave_on_signals() -> None:
    """Raise Left at the first signal and exit at the second; raise KeyboardInterrupt at each Ctrl-C. What `nohup` ignores stays ignored."""
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def leave_if_asked() -> None:
    """Raise Left if a signal has asked to end and its exception was lost on the way."""
    if _asked:
        raise Left(_asked[0])


def _interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    _asked.append(signal.Signals(number).name)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    _asked.append(signal.Signals(number).name)
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
