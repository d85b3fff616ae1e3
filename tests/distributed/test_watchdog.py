"""The watchdog: its limits follow from the steps so far, and it names the process that the others wait for."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.workers import run_workers, worker_environment

from llamahome.distributed.watchdog import FACTOR, FLOOR_S, LONGER, Parts, Standing, verdict


def after(steps: list[float], *, limit_s: float | None = None, part: str = "forward") -> Parts:
    """Parts in which steps of those lengths are over and `part` has begun."""
    parts, now = Parts(limit_s), 1e6
    for seconds in steps:
        parts.enter("data", now)
        parts.enter("forward", now)
        now += seconds
        parts.enter("", now)
    parts.enter("data", now)
    parts.enter(part, now)
    return parts


def test_a_part_may_last_many_times_the_median_step_but_never_less_than_the_floor() -> None:
    assert after([0.1] * 10).limit() == FLOOR_S
    assert after([40.0] * 10).limit() == pytest.approx(FACTOR * 40)
    assert after([40.0] * 10 + [4000.0]).limit() == pytest.approx(FACTOR * 40), "one slow step changes little"
    assert after([40.0] * 10, limit_s=7.0).limit() == 7.0


def test_the_first_steps_may_compile() -> None:
    assert after([40.0] * 3).median_step == 40.0 and after([40.0] * 2).median_step is None
    assert after([]).limit() == after([0.1]).limit() == LONGER * FLOOR_S
    assert after([], limit_s=7.0).limit() == LONGER * 7


@pytest.mark.parametrize("part", ["evaluate", "save"])
def test_an_evaluation_or_a_save_may_last_long_and_ten_times_the_longest_so_far(part: str) -> None:
    parts = after([0.1] * 10, part=part)
    assert parts.limit() == LONGER * FLOOR_S
    parts.enter("", 1e6 + 1.0 + 1000.0)
    parts.enter(part, 1e6 + 5000.0)
    assert parts.limit() == pytest.approx(10 * 1000.0)
    assert parts.median_step == pytest.approx(0.1), "neither counts as a part of a step"


def test_the_process_that_the_others_wait_for_is_named_with_its_stack() -> None:
    waits, reads = Standing("exchange", 301.0, "wait"), Standing("data", 302.0, "loader.py:5 in next: read()")
    problem = verdict({0: waits, 1: reads, 2: waits}, 3, usual=1.5, log=Path("logs/rank-0.log"))
    assert problem.message == (
        "no progress for 5:02 (a step takes 0:02): process 1 is waiting for data; processes 0 and 2 are waiting for the other processes"
    )
    assert problem.excerpt == "process 1, innermost last; all threads: logs/rank-1.log\nloader.py:5 in next: read()"


def test_a_process_that_gives_no_sign_is_named_first() -> None:
    problem = verdict({0: Standing("exchange", 400.0, "wait")}, 2, usual=None, log=Path("logs/rank-0.log"))
    assert problem.message.startswith("no progress for 6:40: process 1 is silent")
    assert "process 0 is waiting for the other processes" in problem.message


PROGRAM = """
import sys, threading, time
from pathlib import Path
from llamahome.distributed.rank_status import RankStatus
from llamahome.distributed.watchdog import Watchdog

dog = Watchdog(RankStatus(), Path(sys.argv[1]), limit_s={limit}, tick_s=0.05)
with dog.watching():
    for _ in range(5):
        dog.enter("data")
        dog.enter("forward")
    print("ready", flush=True)
    {then}
print("end", flush=True)
"""


def watched(then: str, log: Path, *, limit: float) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM.format(then=then, limit=limit), str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=worker_environment())
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_process_that_hangs_ends_with_the_stacks_of_all_threads(tmp_path: Path) -> None:
    with watched("threading.Event().wait(60)", tmp_path / "rank-0.log", limit=0.4) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 4 and out == ""
    assert "error[training.hung]" in err and "in a forward pass" in err and "in wait: " in err
    log = (tmp_path / "rank-0.log").read_text()
    assert "no progress" in log and log.count("hread 0x") >= 2 and "threading.py" in log


def test_a_process_that_was_stopped_for_longer_than_the_limit_goes_on(tmp_path: Path) -> None:
    """As on a laptop that was suspended: only time in which the process ran counts."""
    wait = f"while not Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.02)"
    with watched(wait, tmp_path / "rank-0.log", limit=1.5) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        (tmp_path / "go").touch()
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "end\n", "")


def test_all_processes_agree_who_hangs() -> None:
    first, second = run_workers("tests/distributed/tasks.py:one_hangs", 2)
    assert first == second
    assert first["message"].endswith("process 1 is waiting for data; process 0 is waiting for the other processes")
    assert "in one_hangs" in first["excerpt"]
