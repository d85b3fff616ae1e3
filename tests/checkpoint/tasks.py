"""Tasks of the worker processes of test_collective_save.py: all save checkpoints, and one of them fails or ends in a save."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random

import torch
from tests.support.checkpoints import PRINTS, save, state_at, tensors_at, write_model_of

from llamahome.checkpoint.collective_save import save_together
from llamahome.checkpoint.store import SaveFailed
from llamahome.distributed.tensorfiles import TensorSlices, WriterShare, collect, write_files
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.shard_load import range_of
from llamahome.rundir import RunPaths

ARGUMENTS = {"config_text": "training: {seed: 3}\n", "fingerprints": PRINTS, "optimizer_values": {"lr": 1e-3, "betas": [0.9, 0.999]}}


def save_with_a_full_disk(world: World, payload):
    paths = RunPaths(Path(payload["folder"]), "20260101-000000-brisk-otter")
    save(paths, state=state_at(3), write_model=write_model_of(3), optimizer_tensors=tensors_at(3), world=world, **ARGUMENTS)

    def fail(folder: Path, share: WriterShare) -> list[Path]:
        (folder / f"part-{share.number}").write_text("half")
        if world.rank == payload["full"]:
            raise OSError(28, "No space left on device")
        return [folder / f"part-{share.number}"]

    try:
        save_together(world, paths, state=state_at(4), writes={"model": fail, "optimizer": lambda *_: []}, needed=lambda: 1, **ARGUMENTS)
    except SaveFailed as error:
        return {"code": error.problems[0].code, "message": error.problems[0].message}
    return {}


def save_beside_exchanges(world: World, payload):
    """Save steps 3 to 8 in a thread while the loop exchanges sums; rank `full` cannot write step 5 and has no copies of step 6.

    Each rank sleeps at other places. Returns the codes of the saves by step, and whether all sums were right.
    """
    paths = RunPaths(Path(payload["folder"]), "20260101-000000-brisk-otter")
    beside, random = world.beside(timedelta(seconds=60)), Random(world.rank)

    def write(step: int) -> None:
        def files(folder: Path, share: WriterShare) -> list[Path]:
            time.sleep(random.uniform(0, 0.1))
            if world.rank == payload["full"] and step in (5, 6):
                problem = Problem(code="checkpoint.write-failed", message="no memory for a copy")
                raise OSError(28, "No space left on device") if step == 5 else SaveFailed(problem)
            (folder / f"part-{share.number}").write_text(f"{step}")
            return [folder / f"part-{share.number}"]

        save_together(
            beside, paths, state=state_at(step), writes={"model": files, "optimizer": lambda *_: []}, needed=lambda: 1, **ARGUMENTS
        )

    ended, sums, saved = {}, 0, None
    with ThreadPoolExecutor(1) as thread:
        for step in range(3, 9):
            saved = thread.submit(write, step)
            while not world.any(saved.done()):
                total = torch.full((1000,), float(world.rank + step))
                world.sum_(total)
                sums += bool((total == 2 * step + 1).all()) - 1
                time.sleep(random.uniform(0, 0.02))
            error = saved.exception()
            ended[step] = [error.problems[0].code, type(error).__name__] if error is not None else None
    return {"ended": ended, "wrong sums": sums}


def end_in_a_save(world: World, payload):
    """Process 1 ends without a word while it writes; process 0 writes to the file `told` what the save came to."""
    paths = RunPaths(Path(payload["folder"]), "20260101-000000-brisk-otter")
    beside = world.beside(timedelta(seconds=60))
    save(paths, state=state_at(3), write_model=write_model_of(3), optimizer_tensors=tensors_at(3), world=world, **ARGUMENTS)

    def files(folder: Path, share: WriterShare) -> list[Path]:
        (folder / f"part-{share.number}").write_text("half")
        if world.rank == 1:
            os._exit(0)
        return [folder / f"part-{share.number}"]

    with ThreadPoolExecutor(1) as thread:
        writes = {"model": files, "optimizer": lambda *_: []}
        saved = thread.submit(save_together, beside, paths, state=state_at(4), writes=writes, needed=lambda: 1, **ARGUMENTS)
        Path(payload["told"]).write_text(saved.exception().problems[0].code)


SHAPES = {"even": (4, 3), "uneven": (5, 2), "one row": (1, 7), "vector": (9,)}


def write_rows(tensors, folder: Path, share: WriterShare) -> list[Path]:
    return write_files(folder, "optimizer", tensors, part=share).mine


def save_rows(world: World, payload):
    """Each rank has rows of four tensors. They are saved three times in a thread, beside sums of the loop; in the second save rank `full`
    has no memory for a whole tensor. `machine` ranks hold a copy of the weights together. Returns whether saves failed for want of memory.
    """
    paths, machine = RunPaths(Path(payload["folder"]), "20260101-000000-brisk-otter"), payload["machine"]
    beside, empty, codes = world.beside(timedelta(seconds=60)), torch.empty, []

    def rows_of(name: str, step: int) -> TensorSlices:
        whole = torch.full(SHAPES[name], float(step)) * torch.arange(SHAPES[name][0]).reshape(-1, *[1] * (len(SHAPES[name]) - 1))
        ranges = [range_of(SHAPES[name][0], number, machine) for number in range(machine)]
        counts, mine = [count for _, count in ranges], whole.narrow(0, *ranges[world.rank % machine])
        return TensorSlices(whole.nbytes, lambda to: collect(beside, mine, counts, first=to // machine * machine, to=to))

    def refuse(*shape, **options):
        if shape[0] in SHAPES.values():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*shape, **options)

    with ThreadPoolExecutor(1) as thread:
        for step in (1, 2, 3):
            tensors = {name: rows_of(name, step) for name in SHAPES}
            writes = {"model": lambda *_: [], "optimizer": partial(write_rows, tensors)}
            torch.empty = refuse if step == 2 and world.rank == payload["full"] else empty
            saved = thread.submit(save_together, beside, paths, state=state_at(step), writes=writes, needed=lambda: 1, **ARGUMENTS)
            while not world.any(saved.done()):
                world.sum_(torch.ones(3))
            error = saved.exception()
            codes.append("memory ran out" in error.problems[0].message if error is not None else None)
    return codes


def save_beside_a_leftover(world: World, payload):
    """Rank 1 has a disk of its own, with what a save of the same step has left in a folder of the same name."""
    root = Path(payload["folder"]) / str(world.rank)
    for name in ("model", "optimizer"):
        (root / "checkpoint-3.tmp" / name).mkdir(parents=True)
    world.barrier()
    paths = RunPaths(root, "20260101-000000-brisk-otter")
    save(paths, state=state_at(3), write_model=write_model_of(3), optimizer_tensors=tensors_at(3), world=world, **ARGUMENTS)
    return [path.name for path in sorted(root.iterdir())]
