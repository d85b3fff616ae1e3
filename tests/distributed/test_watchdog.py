"""The watchdog: its limits follow from the steps so far, and it names the process that the others wait for."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.processes import alive
from tests.support.workers import run_workers, worker_environment

from llamahome.distributed.standing import IDLE, START_PARTS, Standing, verdict
from llamahome.distributed.watchdog import FACTOR, FLOOR_S, LONGER, Parts


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


@pytest.mark.parametrize("part", START_PARTS)
def test_before_the_training_a_part_may_show_no_progress_for_as_long_as_the_floor(part: str) -> None:
    assert after([], part=part).limit() == FLOOR_S
    assert after([], limit_s=7.0, part=part).limit() == 7.0
    assert after([], limit_s=7.0, part=IDLE).limit() == float("inf")


def test_a_process_that_only_answers_is_not_the_one_that_hangs() -> None:
    waits, stands = Standing("exchange", 2.0, "wait", ends=False), Standing("read", 302.0, "read()", "its process 7 is stopped")
    problem = verdict({0: Standing("load", 1.0, "load()", ends=False), 1: waits, 2: stands}, 4)
    assert problem.message == (
        "no progress for 5:02: process 3 is silent: it was stopped, its machine is gone, or C code keeps Python's lock; "
        "process 2 is reading the data (its process 7 is stopped); process 0 is loading the model; "
        "process 1 is waiting for the other processes"
    )
    assert problem.excerpt == "process 2, innermost last\nread()"
    assert problem.hint == "the same command again; if it was only slow, with --set training.hang_timeout='1 h'"


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


@pytest.mark.medium
def test_all_processes_agree_who_hangs() -> None:
    first, second = run_workers("tests/distributed/tasks.py:one_hangs", 2)
    assert first == second
    assert first["message"].endswith("process 1 is waiting for data; process 0 is waiting for the other processes")
    assert "in one_hangs" in first["excerpt"]


STARTING = """
import os, signal, subprocess, sys, threading, time
from llamahome.distributed.rank_status import RankStatus
from llamahome.distributed.watchdog import Watchdog
from llamahome.progress_marks import NO_LIMIT, marks

def lasts(): return time.monotonic() < begun + 2.5

with Watchdog(RankStatus(), limit_s=0.8, tick_s=0.05).watching("read"):
    begun = time.monotonic()
    {then}
print("end", flush=True)
"""
MOVING = {
    "marks a block now and then": "while lasts(): time.sleep(0.2); marks.advance()",
    "computes": "while lasts(): sum(range(10_000))",
    "reads": "while lasts(): time.sleep(0.1); open(sys.executable, 'rb').read(1 << 17)",
    "has a child that computes": (
        "subprocess.run([sys.executable, '-c', "
        "f'import time; [sum(range(9999)) for _ in iter(lambda: time.monotonic() < {begun + 2.5}, False)]'])"
    ),
    "waits for what has its own limit": "with marks.allowing(NO_LIMIT): time.sleep(2.5)",
}


def started(then: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", STARTING.format(then=then), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=worker_environment(), check=False)


@pytest.mark.medium
@pytest.mark.parametrize("how", MOVING)
def test_a_start_that_moves_goes_on_whatever_the_limit(how: str) -> None:
    ended = started(MOVING[how])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")


def test_a_start_that_waits_for_a_pipe_ends_with_its_place_and_its_stack(tmp_path: Path) -> None:
    """The system call blocks, as that of a folder on a server that is gone."""
    os.mkfifo(tmp_path / "pipe")
    ended = started("open(sys.argv[1])", str(tmp_path / "pipe"))
    assert ended.returncode == 4 and ended.stdout == "", ended.stderr
    assert re.search(r"no progress for 0:0[1-9]: reading the data\n", ended.stderr)
    assert "process 0, innermost last" in ended.stderr and "in <module>" in ended.stderr
    assert "help: the same command again; if it was only slow, with --set training.hang_timeout='1 h'" in ended.stderr


def test_a_start_that_waits_in_a_thread_for_a_stopped_process_names_both_and_leaves_none(tmp_path: Path) -> None:
    then = f"""child = subprocess.Popen(["sleep", "60"])
    child.send_signal(signal.SIGSTOP)
    open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    worker = threading.Thread(target=child.wait, name="reader")
    worker.start()
    worker.join()"""
    ended = started(then)
    child = int((tmp_path / "pid").read_text())
    assert ended.returncode == 4, ended.stderr
    assert f"reading the data (its process {child} is stopped)" in ended.stderr
    assert "in reader:" in ended.stderr and "subprocess.py" in ended.stderr
    assert not alive(child, within=10)


@pytest.mark.medium
def test_while_one_process_reads_for_ever_the_others_wait_and_say_so() -> None:
    first, second = run_workers("tests/distributed/tasks.py:one_reads_for_ever", 2)
    assert first == []
    assert second == ["process 1 is reading the data; process 0 is waiting for the other processes"]
