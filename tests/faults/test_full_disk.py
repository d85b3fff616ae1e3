import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
from tests.support.checkpoints import PRINTS, differences, save, save_step, state_at
from tests.support.small_disks import small_disk
from tests.support.workers import ROOT, worker_environment

from llamahome.checkpoint.background import writer_thread
from llamahome.checkpoint.store import SaveFailed, load
from llamahome.rundir import RunPaths

SAVER = [sys.executable, str(ROOT / "tests" / "support" / "saver.py")]
RUN_ID = "20260101-000000-brisk-otter"


@contextmanager
def _small_disk(folder, size):
    with small_disk(folder, size):
        yield RunPaths(folder, RUN_ID)


def _only_the_first_is_left(run, size=64):
    assert [path.name for path in run.root.iterdir()] == ["checkpoint-1"]
    assert differences(load(run.checkpoint(1)), size=size) == []


def test_a_limit_on_the_size_of_a_file_leaves_no_partial_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    run = RunPaths(tmp_path / "run", RUN_ID)
    save_step(run, 1)
    done = subprocess.run(
        [*SAVER, "limited", str(run.root), "20000", "50000"], env=worker_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["code"] == "checkpoint.write-failed" and "File too large" in result["message"]
    _only_the_first_is_left(run)


def test_a_disk_that_fills_up_while_writing_leaves_no_partial_checkpoint(tmp_path):
    with _small_disk(tmp_path / "disk", "12m") as run:
        save_step(run, 1)

        def write_model(folder):
            for number in range(20):
                (folder / f"part-{number}").write_bytes(bytes(2**20))

        for step in (2, 3):
            with pytest.raises(SaveFailed) as caught:
                save(
                    run,
                    state=state_at(step),
                    config_text="",
                    fingerprints=PRINTS,
                    write_model=write_model,
                    optimizer_tensors={},
                    optimizer_values={},
                )
            assert "No space left" in caught.value.problems[0].message
            _only_the_first_is_left(run)
        assert load(save_step(run, 4)).state.step == 4


def test_a_disk_that_is_too_small_is_an_error_with_numbers_before_anything_is_written(tmp_path):
    with _small_disk(tmp_path / "disk", "3m") as run:
        with pytest.raises(SaveFailed) as caught:
            save_step(run, 1)
        assert "needs about 8.0 MiB and 3.0 MiB are free" in caught.value.problems[0].message
        assert list(run.root.iterdir()) == []


def test_a_disk_that_became_read_only_is_an_error_and_damages_nothing(tmp_path):
    with _small_disk(tmp_path / "disk", "64m") as run:
        save_step(run, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(run.root)], check=True)
        with pytest.raises(SaveFailed) as caught:
            save_step(run, 2)
        assert "Read-only file system" in caught.value.problems[0].message
        _only_the_first_is_left(run)


def test_a_disk_that_fills_up_during_a_background_save_is_the_error_of_its_future(tmp_path):
    with _small_disk(tmp_path / "disk", "12m") as run, writer_thread() as thread:
        save_step(run, 1)
        (run.root / "ballast").write_bytes(bytes(10 * 2**20))
        failed = thread.submit(save_step, run, 2, size=400_000)
        assert isinstance(failed.exception(), SaveFailed)
        (run.root / "ballast").unlink()
        _only_the_first_is_left(run)
        assert thread.submit(save_step, run, 3).result() == run.checkpoint(3)
