"""A signal to a command that saves nothing ends it with 130 and its clean-up; one that comes after the result changes nothing."""

import signal
import subprocess
import sys

import pytest

from llamahome.signals import _ENDING

PROGRAM = """
import os, signal, sys, time, weakref
from llamahome import signals
signals.leave_on_signals()
def tell(text):
    print(text, flush=True)
try:
    {then}
except signals.Left:
    tell("left")
finally:
    tell("cleaned up")
signals.ignore_signals()
os.kill(os.getpid(), signal.SIGTERM)
tell("end")
"""


def outcome(then: str, **settings) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(then=then)], capture_output=True, text=True, check=False, **settings)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("number", _ENDING)
def test_a_signal_ends_a_command_with_its_clean_up(number: signal.Signals) -> None:
    assert outcome(f"os.kill(os.getpid(), {int(number)}); tell('went on')") == (0, ["left", "cleaned up", "end"])


def test_a_second_signal_does_not_wait_for_the_clean_up() -> None:
    twice = "\n    ".join(["try:", "    os.kill(os.getpid(), 15)", "except signals.Left:", "    os.kill(os.getpid(), 15); tell('went on')"])
    assert outcome(twice) == (130, [])


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    assert outcome("os.kill(os.getpid(), signal.SIGHUP); tell('went on')", **ignored) == (0, ["went on", "cleaned up", "end"])


LOST = """lose()
    tell("went on")
    signals.leave_if_asked()
    tell("trains")"""
LOSSES = {
    "destructor": "class Dying:\n    def __del__(self):\n        os.kill(os.getpid(), {number}); time.sleep(0.1)\ndef lose():\n    Dying()",
    "bare except": "def lose():\n    try:\n        os.kill(os.getpid(), {number}); time.sleep(0.1)\n    except:\n        pass",
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("number", [signal.SIGINT, *_ENDING])
def test_a_signal_whose_exception_is_lost_is_remembered(number: signal.Signals, loss: str) -> None:
    then = LOST.replace("lose()", LOSSES[loss].format(number=int(number)).replace("\n", "\n    ") + "\n    lose()")
    assert outcome(then) == (0, ["went on", "left", "cleaned up", "end"])


def test_without_a_signal_nothing_is_left() -> None:
    assert outcome("signals.leave_if_asked(); tell('trains')") == (0, ["trains", "cleaned up", "end"])
