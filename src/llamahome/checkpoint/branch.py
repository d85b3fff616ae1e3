"""A checkpoint of one run as the beginning of another: the same files, linked where the disk can, in the folder of the new run.

Whole or not there, as every checkpoint. Retention leaves it alone, for its manifest names the run it came from.
"""

import os
import shutil
from pathlib import Path

from llamahome.checkpoint.store import DiskBorder, commit
from llamahome.rundir import RunPaths


def branch(folder: Path, step: int, paths: RunPaths) -> Path:
    """Put the checkpoint `folder`, of `step`, into the run of `paths`. Called by one process; raises SaveFailed."""
    mine = paths.checkpoint(step)
    fresh = mine.with_name(f"{mine.name}.tmp")
    with DiskBorder(fresh):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for path in sorted(folder.rglob("*")):  # a folder before what is in it
            beside = fresh / path.relative_to(folder)
            if path.is_dir():
                beside.mkdir()
            else:
                _link(path, beside)
        commit(fresh, mine)
    return mine


def _link(source: Path, target: Path) -> None:
    """A second name for a file that nobody writes to any more; a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
