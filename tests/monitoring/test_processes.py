"""A process is known by its number and its birth, so that another one with its number is never signalled in its place."""

import os
import subprocess
import sys
from dataclasses import replace

from tests.support.projects import wait_until

from llamahome.monitoring.processes import ProcessId, belongs_to, identify, is_alive, is_python_module


def test_a_process_is_alive_until_it_ends_and_another_birth_is_another_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        found = identify(child.pid)
        assert is_alive(found) and not is_alive(replace(found, born=found.born - 5))
        child.kill()
        wait_until(lambda: not is_alive(found))  # also while it waits for its parent
    assert identify(child.pid) is None and not is_alive(found)


def test_what_a_process_starts_belongs_to_it_and_what_starts_it_does_not() -> None:
    own = identify(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert belongs_to(child.pid, own) and belongs_to(own.pid, own)
            assert not belongs_to(own.pid, identify(child.pid)) and not belongs_to(child.pid, replace(own, born=0.0))
        finally:
            child.kill()


def test_a_module_is_recognised_by_the_command_line() -> None:
    with subprocess.Popen([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "0"], stderr=subprocess.DEVNULL) as child:
        try:
            found = identify(child.pid)
            wait_until(lambda: is_python_module(found, "http.server"))
            assert not is_python_module(found, "llamahome") and not is_python_module(replace(found, born=0.0), "http.server")
        finally:
            child.kill()


def test_a_number_that_no_process_has_is_nobody() -> None:
    assert identify(-1) is None and identify(2**40) is None
    assert not belongs_to(2**40, identify(os.getpid())) and not is_alive(ProcessId(2**40, 0.0))
