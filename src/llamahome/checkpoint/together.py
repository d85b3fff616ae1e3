"""A checkpoint that all processes write at once, with the same promise as one that a single process writes: whole, or not there.

Process 0 makes the folder, every process that sees it writes, flushes and hashes its files, process 0 seals and renames. Whoever fails,
all are told and nothing stays. What is written does not depend on how many wrote it, so any other number of processes reads it.
Cost: one exchange of a few bytes per phase, four in all, and those that gather tensors of which processes hold pieces.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llamahome.checkpoint import manifest
from llamahome.checkpoint.manifest import FileRecord, Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.checkpoint.store import CONFIG, STATE, VALUES, DiskBorder, SaveFailed, commit, holds, require_space
from llamahome.distributed.tensorfiles import Part
from llamahome.distributed.world import World
from llamahome.errors import CheckpointError, Problem
from llamahome.rundir import RunPaths

Write = Callable[[Path, Part], Sequence[Path]]
"""Fills a folder with its share and returns the files that this process wrote; what process 0 wrote it need not tell."""


def save_together(
    world: World,
    paths: RunPaths,
    *,
    state: TrainerState,
    config_text: str,
    fingerprints: Fingerprints,
    writes: Mapping[str, Write],
    optimizer_values: Mapping[str, Any],
    needed: int,
) -> Path:
    """Commit `checkpoint-<state.step>` and return its folder; called by all processes.

    `writes` fill the folders of that name inside it, `needed` bytes in all; each is called on every process, whatever happened to
    another. Raises SaveFailed on all processes when one of them could not write.
    """
    folder = paths.checkpoint(state.step)
    fresh = folder.with_name(f"{folder.name}.tmp")

    def prepare() -> None:
        for leftover in paths.root.glob("checkpoint-*.tmp"):
            shutil.rmtree(leftover)
        require_space(paths.root, needed)
        for name in writes:
            (fresh / name).mkdir(parents=True)

    def finish() -> None:
        (fresh / VALUES).write_text(json.dumps(optimizer_values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (fresh / STATE).write_text(state.to_json(), encoding="utf-8")
        (fresh / CONFIG).write_text(config_text, encoding="utf-8")
        manifest.seal(fresh, run_id=paths.run_id, step=state.step, fingerprints=fingerprints, known=known)
        commit(fresh, folder)

    if world.broadcast_object(world.is_main and holds(folder, state)):
        return folder
    with DiskBorder(fresh) if world.is_main else nullcontext():
        _on_all(world, folder, prepare if world.is_main else _nothing)
        part = _share(world, fresh)
        told = _on_all(world, folder, lambda: _written(fresh, writes, part))
        known = {name: FileRecord(**record) for records in told for name, record in records.items()}
        _on_all(world, folder, finish if world.is_main else _nothing)
    return folder


def _nothing() -> None:
    return None


def _share(world: World, fresh: Path) -> Part:
    """Machines that do not share the disk with process 0 write nothing."""
    writers = [rank for rank, sees in enumerate(world.gather(fresh.is_dir())) if sees]
    return Part(writers.index(world.rank) if world.rank in writers else -1, len(writers))


def _written(fresh: Path, writes: Mapping[str, Write], part: Part) -> dict[str, Any]:
    """Do all writes, each on its own, for the others wait in each; the records of the files that process 0 did not write."""
    files: list[Path] = []
    failed: list[Exception] = []
    for name, write in writes.items():
        try:
            files += write(fresh / name, part)
        except (OSError, SafetensorError) as error:
            failed.append(error)
    if failed:
        raise failed[0]
    records = dict(manifest.flushed(fresh, path) for path in files) if part.number > 0 else {}
    return {name: asdict(record) for name, record in records.items()}


def _on_all(world: World, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each process; the first failure of any of them is raised on all, and nothing stays."""
    answer: dict[str, Any] = {"told": None, "problem": None}
    mine: CheckpointError | None = None
    try:
        with DiskBorder(folder):
            answer["told"] = work()
    except CheckpointError as error:
        mine, answer["problem"] = error, asdict(error.problems[0])
    answers = world.gather(answer)
    problems = [each["problem"] for each in answers if each["problem"] is not None]
    if problems:
        raise SaveFailed(Problem(**problems[0])) from mine
    return [each["told"] for each in answers]
