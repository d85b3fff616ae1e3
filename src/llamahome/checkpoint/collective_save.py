"""A checkpoint that all processes write together; like a checkpoint of one process it is complete or it does not exist.

Process 0 creates the folder, every process that sees the folder writes, flushes and hashes its files, then process 0 writes the manifest
and renames the folder. If one process fails, all raise and the partial folder is removed. The content does not depend on the number of
processes, so any number of processes can read it.
Cost: four collectives of a few bytes, and the messages with the rows of sharded tensors.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llamahome import durable
from llamahome.checkpoint import manifest
from llamahome.checkpoint.manifest import FileRecord, Fingerprints
from llamahome.checkpoint.state import STATE, TrainerState
from llamahome.checkpoint.store import CONFIG, VALUES, SaveFailed, WriteGuard, contains, require_space
from llamahome.distributed.devices import is_out_of_memory
from llamahome.distributed.tensorfiles import WRITES_ALL, WriterShare
from llamahome.distributed.world import World
from llamahome.errors import CheckpointError, Problem
from llamahome.rundir import RunPaths

Write = Callable[[Path, WriterShare], Sequence[Path]]
"""Writes this process's share into a folder and returns the files that it wrote; process 0 may return none."""
_MARK = "mark"
"""A file in a partial folder by which processes recognise it: another machine may have one of the same name on its own disk."""


def save_together(
    world: World,
    paths: RunPaths,
    *,
    state: TrainerState,
    config_text: str,
    fingerprints: Fingerprints,
    writes: Mapping[str, Write],
    optimizer_values: Mapping[str, Any],
    needed: Callable[[], int],
) -> Path:
    """Commit `checkpoint-<state.step>` and return its folder. Called by all processes.

    `writes` maps the name of a subfolder to the function that fills it; every process calls every function, even after a failure of
    another. `needed` returns the number of bytes of all files; process 0 calls it. Raises SaveFailed on all processes if one of them
    could not write or had no memory for it.
    """
    folder = paths.checkpoint(state.step)
    partial = folder.with_name(f"{folder.name}.tmp")

    def prepare() -> str:
        for leftover in paths.root.glob(".trash-checkpoint-*.tmp"):
            durable.remove_tree(leftover)
        for leftover in paths.root.glob("checkpoint-*.tmp"):
            durable.remove_folder(leftover)  # renamed first: were another run writing there, it could not commit what is left
        require_space(paths.root, needed())
        for name in writes:
            (partial / name).mkdir(parents=True)
        mark = os.urandom(16).hex()
        (partial / _MARK).write_text(mark)
        return mark

    def finish() -> None:
        (partial / _MARK).unlink()
        (partial / VALUES).write_text(json.dumps(optimizer_values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (partial / STATE).write_text(state.to_json(), encoding="utf-8")
        (partial / CONFIG).write_text(config_text, encoding="utf-8")
        manifest.seal(partial, run_id=paths.run_id, step=state.step, fingerprints=fingerprints, known=records)
        durable.replace_folder(partial, folder)

    if world.broadcast_object(world.is_main and contains(folder, state)):
        return folder
    with WriteGuard(partial) if world.is_main else nullcontext():
        mark = _on_all(world, folder, prepare if world.is_main else None)[0]
        share = _writer_share(world, partial, mark)
        results = _on_all(world, folder, lambda: _write_share(partial, writes, share))
        records = {name: FileRecord(**record) for result in results for name, record in result.items()}
        _on_all(world, folder, finish if world.is_main else None)
    return folder


def _writer_share(world: World, partial: Path, mark: str) -> WriterShare:
    """The share of this process; processes that do not see the folder, because their machine has another disk, write nothing."""
    if world.size == 1:
        return WRITES_ALL
    try:
        sees = (partial / _MARK).read_text() == mark
    except OSError:
        sees = False
    writers = tuple(rank for rank, each in enumerate(world.gather(sees)) if each)
    return WriterShare(writers.index(world.rank) if world.rank in writers else -1, len(writers), writers)


def _write_share(partial: Path, writes: Mapping[str, Write], share: WriterShare) -> dict[str, Any]:
    """Call all of `writes`, even after an error, because in each others may wait for this process; records of the files, except those of
    process 0.
    """
    files: list[Path] = []
    errors: list[Exception] = []
    for name, write in writes.items():
        try:
            files += write(partial / name, share)
        except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            errors.append(error)
    if errors:
        raise errors[0]
    records = dict(manifest.flush_file(partial, path) for path in files) if share.number > 0 else {}
    return {name: asdict(record) for name, record in records.items()}


def _on_all(world: World, folder: Path, work: Callable[[], Any] | None) -> list[Any]:
    """The results of `work` of all processes, by rank. If it fails on one process, all raise the first error."""
    outcome: dict[str, Any] = {"result": None, "problem": None}
    own_error: CheckpointError | None = None
    try:
        with WriteGuard(folder):
            outcome["result"] = work() if work is not None else None
    except CheckpointError as error:
        own_error, outcome["problem"] = error, asdict(error.problems[0])
    outcomes = world.gather(outcome)
    problems = [each["problem"] for each in outcomes if each["problem"] is not None]
    if problems:
        raise SaveFailed(Problem(**problems[0])) from own_error
    return [each["result"] for each in outcomes]
