"""All processes resume the checkpoint that process 0 has chosen.

Each process looks for the newest intact checkpoint by itself, before the processes know each other. They may find different ones: a client
of NFS shows a new folder some seconds later, and a damaged disk may be that of one machine. Weights of different steps would be trained as
if they were one model.
Cost: two exchanges of a few bytes. A process that has read another checkpoint reads again.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from llamahome.checkpoint import manifest
from llamahome.checkpoint.store import Saved, load
from llamahome.distributed.failures import run_to_go_on
from llamahome.distributed.world import World
from llamahome.errors import CheckpointError, Problem
from llamahome.rundir import open_run

_APPEARS_S = 60.0
"""How long a folder is waited for that another machine has seen; NFS caches names for at most 60 s by default (acdirmax)."""
_POLL_S = 0.5
_SLOW_DISK = 50e6
"""Bytes a second of a disk that many machines read at the same time."""


def reading_time(saved: Saved) -> float:
    """Seconds that another process may need to verify this checkpoint."""
    return manifest.read(saved.folder).total_bytes / _SLOW_DISK


def require_same_start(world: World, *, resumes: bool) -> None:
    """Raise CheckpointError checkpoint.ranks-differ on all processes if only some of them resume a checkpoint. All processes call it.

    In a later attempt of the same launch, a process that sees no checkpoint of the run first waits until it does: then the next attempt
    resumes on all of them.
    """
    ways = world.gather(resumes)
    if all(ways) or not any(ways):
        return
    begun, deadline = run_to_go_on(), time.monotonic() + _APPEARS_S
    while not resumes and begun is not None and not open_run(begun).checkpoints() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    world.barrier()
    message = f"process {ways.index(True)} resumes a checkpoint, process {ways.index(False)} does not see one and would begin anew"
    hint = "llamahome train-resume RUN on all machines, with the folder of the run on a disk that all of them share"
    raise CheckpointError(Problem(code="checkpoint.ranks-differ", message=message, hint=hint))


def same_for_all(world: World, own: Saved, *, say: Callable[[str], None]) -> Saved:
    """The checkpoint of process 0, on every process; `own` is what this process has read. All processes call it.

    `say` gets a line for each process that had found another one. Raises CheckpointError checkpoint.ranks-differ on all processes if one of
    them cannot read it.
    """
    found = _digest(own.folder)
    folder, digest = world.broadcast_object([str(own.folder.resolve()), found])
    chosen, problem = own, None
    if found != digest:
        try:
            chosen = _wait_for(Path(folder), own.folder.with_name(Path(folder).name), digest)
        except CheckpointError as error:
            message = f"process {world.rank} cannot read the checkpoint that process 0 resumes: {error.problems[0].message}"
            problem = Problem(code="checkpoint.ranks-differ", message=message, where=folder, hint=error.problems[0].hint)
    differing = {"found": own.folder.name, "problem": asdict(problem) if problem is not None else None} if found != digest else None
    for rank, each in enumerate(world.gather(differing)):
        if each is not None and each["problem"] is not None:
            raise CheckpointError(Problem(**each["problem"]))
        if each is not None:
            say(f"process {rank} had found {each['found']}: all resume {Path(folder).name}, the choice of process 0")
    return chosen


def _wait_for(folder: Path, beside: Path, digest: str) -> Saved:
    """Read the checkpoint with this digest, in `folder` or `beside` the one that was found here, once this machine sees it."""
    deadline = time.monotonic() + _APPEARS_S
    while True:
        for place in (folder, beside):
            if _digest(place) == digest:
                return load(place)
        if time.monotonic() > deadline:
            message = f"{folder.name} is not there, or not the same"
            raise CheckpointError(Problem(code="checkpoint.ranks-differ", message=message, where=str(folder)))
        time.sleep(_POLL_S)


def _digest(folder: Path) -> str | None:
    """Of the manifest, which holds the run, the step and the hashes of all files; None if it cannot be read."""
    try:
        return hashlib.sha256((folder / manifest.NAME).read_bytes()).hexdigest()
    except OSError:
        return None
