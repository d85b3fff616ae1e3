"""A signal to a command that saves nothing ends it with 130 and its clean-up; one that comes after the result changes nothing."""

import signal
import subprocess
import sys

import pytest

from llamahome.cli.signals import _ENDING

PROGRAM = """
import os, signal, sys
from llamahome.cli import signals
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
