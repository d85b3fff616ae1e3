"""In a real control group whose memory runs out, a run with the watch goes on in smaller passes; without it, the kernel kills it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.models import save_tiny
from tests.support.workers import ROOT, worker_environment

MEMORY = Path("/sys/fs/cgroup/memory")
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
ROOM = 500 * 2**20


@pytest.fixture
def group() -> Iterator[Path]:
    folder = MEMORY / f"llamahome-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this container may not make memory control groups (version 1)")
    yield folder
    folder.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("watch", [True, False])
def test_the_watch_lowers_the_budget_before_the_kernel_kills(tmp_path: Path, group: Path, watch: bool) -> None:
    save_tiny(tmp_path / "base", "llama", **SHAPE)
    words = [sys.executable, "-m", "tests.support.tight", str(tmp_path), str(group), str(ROOM), str(int(watch))]
    done = subprocess.run(words, cwd=ROOT, env=worker_environment(), capture_output=True, text=True, timeout=500, check=False)
    if not watch:
        assert done.returncode == -signal.SIGKILL, "this limit kills a run that does not look"
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["step"] == 2 and found["budget"] < 16_384 and "out-of-memory" in found["events"]
