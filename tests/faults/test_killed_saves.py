import json
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
from tests.support.checkpoints import differences, save_step
from tests.support.workers import ROOT, worker_environment

from llamahome.checkpoint.store import choose, load
from llamahome.rundir import RunPaths

SAVER = [sys.executable, str(ROOT / "tests" / "support" / "saver.py")]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunPaths(tmp_path / "run", "20260101-000000-brisk-otter")


def _newest(run):
    problems = []
    saved = load(choose(run, warn=problems.append))
    assert problems == []
    return saved


@pytest.mark.medium
def test_a_save_killed_before_any_file_operation_leaves_an_intact_newest_checkpoint(run):
    done = subprocess.run([*SAVER, "sweep", str(run.root)], env=worker_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["faults"] == []
    assert result["points"] > 30 and result["survivors"] == [2, 3]


def _kill_in_the_loop(run, after):
    process = subprocess.Popen([*SAVER, "loop", str(run.root)], env=worker_environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "saving\n"
        time.sleep(after)
    finally:
        process.kill()
        process.communicate(timeout=10)
    saved = _newest(run)
    assert differences(saved, size=20_000) == []
    return saved.state.step


@pytest.mark.slow
def test_kill_9_at_many_moments_of_a_saving_loop_leaves_the_newest_checkpoint_intact(run):
    for seed in range(15):
        _kill_in_the_loop(run, random.Random(seed).uniform(0.0, 0.4))
        shutil.rmtree(run.root)
        run.root.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_kill_9_at_the_nth_system_call_leaves_an_intact_checkpoint(run, call):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    survivors = set()
    for number in range(1, 40):
        shutil.rmtree(run.root)
        run.root.mkdir()
        save_step(run, 1)
        log = run.root.parent / "strace.log"
        inject = f"inject={call}:signal=KILL:when={number}"
        command = [strace, "-f", "-o", str(log), "-e", f"trace={call}", "-e", inject, *SAVER, "once", str(run.root), "2"]
        done = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, timeout=60)
        if done.returncode and "ptrace" in done.stderr:
            pytest.skip("this machine does not allow tracing")
        saved = _newest(run)
        assert differences(saved) == []
        survivors.add(saved.state.step)
        if done.returncode == 0:
            break
        assert re.search(r"killed by SIGKILL", log.read_text())
    assert survivors == {1, 2}
