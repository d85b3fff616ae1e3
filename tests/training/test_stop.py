"""The first signal requests a stop, the second exits; each test has its own process, because a signal goes to a process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamahome.training.stop import StopRequest

PROGRAM = """
import signal, sys, time
from llamahome.training.stop import StopRequest

with StopRequest().listening() as stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("asked", flush=True)
    {then}
print("end", flush=True)
"""
WAIT = "time.sleep(30)"


def started(then: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM.format(then=then)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **{"stderr": subprocess.PIPE, **settings})
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    process = started("pass")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == "asked\nend\n" and "once more leaves at once" in err


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGUSR1, signal.SIGTERM)])
def test_the_second_leaves_at_once(first: signal.Signals, second: signal.Signals) -> None:
    process = started(WAIT)
    process.send_signal(first)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(second)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == "" and "left at once" in err


def test_more_requests_of_a_scheduler_do_not_leave() -> None:
    process = started("time.sleep(0.3)")
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == "end\n" and process.returncode == 0


def test_a_reader_of_the_messages_that_is_gone_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    """`llamahome train ... 2>&1 | tee log`: Ctrl-C ends tee first."""
    with started("pass") as process:
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "asked\nend\n" and process.wait(timeout=20) == 0


def test_signals_are_given_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with StopRequest().listening() as stop:
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
        assert not stop.asked
    assert {number: signal.getsignal(number) for number in before} == before
