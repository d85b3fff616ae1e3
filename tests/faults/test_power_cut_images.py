"""Power cuts on a real ext4: its device is copied while checkpoints are saved, and the copy is mounted as after a cut."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.checkpoints import differences
from tests.support.workers import ROOT, worker_environment

from llamahome.checkpoint import manifest
from llamahome.checkpoint.store import choose, load
from llamahome.rundir import RunPaths

pytestmark = pytest.mark.slow
RUN_ID = "20260101-000000-brisk-otter"
CUTS = 50


@contextmanager
def _mounted(image: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"an image cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_newest_committed_checkpoint_is_on_every_disk_that_a_power_cut_leaves(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("making and mounting a disk needs root and mkfs.ext4")
    image, cut = tmp_path / "disk.img", tmp_path / "cut.img"
    with image.open("wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    source, reached = random.Random(0), []
    with _mounted(image, tmp_path / "disk") as disk:
        (disk / "run").mkdir()
        command = [sys.executable, str(ROOT / "tests/support/saver.py"), "announced", str(disk / "run")]
        with subprocess.Popen(command, env=worker_environment(), stdout=subprocess.PIPE, text=True) as saver:
            committed = [int(saver.stdout.readline())]
            reader = threading.Thread(target=lambda: committed.extend(int(line) for line in saver.stdout), daemon=True)
            reader.start()
            try:
                for _ in range(CUTS):
                    threading.Event().wait(source.uniform(0.0, 0.15))
                    saver.send_signal(signal.SIGSTOP)
                    promised = committed[-1]
                    subprocess.run(["cp", "--sparse=always", str(image), str(cut)], check=True)
                    saver.send_signal(signal.SIGCONT)
                    reached.append(_newest_on(cut, tmp_path / "after", promised))
            finally:
                saver.kill()
    assert len(reached) == CUTS and reached == sorted(reached) and reached[-1] > reached[0]


def _newest_on(image: Path, folder: Path, promised: int) -> int:
    """The step that a resume takes from the disk; at least `promised`, whose save had returned before the cut."""
    with _mounted(image, folder) as disk:
        step = _newest(RunPaths(disk / "run", RUN_ID))
    assert step >= promised
    return step


def _newest(run: RunPaths) -> int:
    """The newest step, after everything that has a checkpoint's name was verified; its tensors, which map the files, are gone then."""
    assert all(manifest.verify(checkpoint) == [] for _, checkpoint in run.checkpoints())
    saved = load(choose(run, warn=lambda problem: pytest.fail(problem.render())))
    assert differences(saved, size=20_000) == []
    return saved.state.step
