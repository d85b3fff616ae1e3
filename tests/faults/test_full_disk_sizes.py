"""Disks of forty sizes, from too small to enough: a save is refused or fails loudly, earlier checkpoints stay, and training goes on."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.checkpoints import PRINTS, differences, save, state_at, tensors_at, write_model_of

from llamahome.checkpoint import retention
from llamahome.checkpoint.store import SaveFailed, choose, load
from llamahome.rundir import RunPaths

VALUES = 40_000
STEPS = 6
SIZES = [round(16 * 1.13**number) for number in range(40)]
"""In KiB: a checkpoint has about 480 KiB, and with keep_last=2 three of them are on the disk for a moment."""


@contextmanager
def _disk(folder: Path, kib: int) -> Iterator[RunPaths]:
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield RunPaths(folder, "20260101-000000-brisk-otter")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _save(run: RunPaths, step: int, *, foretold: bool) -> None:
    """Save as a run does; without `foretold` the space is not asked about before, as if another program took it meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        if not foretold:
            patch.setattr("llamahome.checkpoint.collective_save.require_space", lambda folder, needed: None)
        save(
            run,
            state=state_at(step),
            config_text=f"training: {{seed: {step}}}\n",
            fingerprints=PRINTS,
            write_model=write_model_of(step, VALUES),
            optimizer_tensors=tensors_at(step, VALUES),
            optimizer_values={"lr": 1e-3, "betas": [0.9, 0.999]},
        )
    retention.apply(run, keep_last=2, keep_best=0, warn=lambda problem: None)


def _train_on(run: RunPaths, *, foretold: bool) -> tuple[int, list[str]]:
    """Save six times on this disk; how many saves were done, and what was wrong after any of them."""
    done: list[int] = []
    wrong = []
    for step in range(1, STEPS + 1):
        try:
            _save(run, step, foretold=foretold)
            done.append(step)
        except SaveFailed as error:
            if not error.problems[0].hint or error.problems[0].code != "checkpoint.write-failed":
                wrong.append(f"step {step}: the failure names no way out")
        kept = sorted(step for step, _ in run.checkpoints())
        if kept != done[-2:]:
            wrong.append(f"step {step}: {kept} are left of {done}")
        wrong += [f"step {step}: {what}" for _, folder in run.checkpoints() for what in differences(load(folder), size=VALUES)]
        if done and choose(run, warn=lambda problem: None).name != f"checkpoint-{done[-1]}":
            wrong.append(f"step {step}: the newest is not taken")
        wrong += [f"step {step}: {path.name} is left over" for path in run.root.iterdir() if not path.name.startswith("checkpoint-")]
        wrong += [f"step {step}: {path.name} is half-written" for path in run.root.glob("*.tmp")]
    return len(done), wrong


def _saves_on(folder: Path, sizes: list[int]) -> list[int]:
    saves = []
    for foretold in (False, True):
        for kib in sizes:
            with _disk(folder, kib) as run:
                done, wrong = _train_on(run, foretold=foretold)
            assert wrong == [], f"{kib} KiB: {wrong}"
            if not foretold:
                saves.append(done)
    return saves


def test_a_disk_of_four_sizes_loses_no_checkpoint_and_no_run(tmp_path: Path) -> None:
    assert _saves_on(tmp_path / "disk", [64, 700, 1300, 2600]) == [0, 1, 2, STEPS]


@pytest.mark.slow
def test_a_disk_of_forty_sizes_loses_no_checkpoint_and_no_run(tmp_path: Path) -> None:
    saves = _saves_on(tmp_path / "disk", SIZES)
    assert saves == sorted(saves) and saves[0] == 0 and saves[-1] == STEPS
    print(f"saves done of {STEPS}, by KiB: {dict(zip(SIZES, saves, strict=True))}")
