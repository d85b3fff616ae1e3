"""Measures checkpoints: how fast they are verified, and how long the loop waits for one in the background compared with one in the loop.

python -m benchmarks.checkpoint_speed FOLDER [--mb 1000] [--rounds 5] [--passes 3] [--processes 2] [--sharded]

FOLDER should be on the disk where runs are saved; what is written there is removed. The ways take turns, and medians are printed: time on
the clock, and time of the processor, which a busy machine changes less. A save in the background begins as in a run: the loop names the
tensors, computes for --passes seconds (matrix products on all threads, as a forward and backward pass), and before its update completes
the copies. What the loop waits is the beginning and what is left before the update.
With several processes each holds --mb (its share of them with --sharded), and figures are those of the process that waits longest.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from llamahome.checkpoint import manifest
from llamahome.checkpoint.background import Snapshot, writer_thread
from llamahome.checkpoint.collective_save import save_together
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.config.schema import DistributedConfig
from llamahome.distributed.tensorfiles import TensorSlices, collect, write_files
from llamahome.distributed.world import World, open_world
from llamahome.rundir import RunPaths

_ROWS, _COLUMNS = 1 << 12, 1 << 10
"""Of a tensor."""
Measured = list[dict[str, list[tuple[float, float]]]]
"""For each round and part the seconds of every process: on the clock, and of its processor time."""


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=float, default=3.0, help="seconds")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sharded", action="store_true")
    asked = parser.parse_args()
    if asked.processes > 1 and "RANK" not in os.environ:
        _start(asked.processes)
        return
    with open_world(DistributedConfig(timeout="30 min"), say=print) as world, tempfile.TemporaryDirectory(dir=asked.folder) as own:
        measured = _measure(world, Path(world.broadcast_object(own)), asked)
        slowest = [{name: [max(each) for each in zip(*times, strict=True)] for name, times in parts.items()} for parts in measured]
        if world.is_main:
            _report(world, slowest, asked)


def _start(processes: int) -> None:
    """Start this program as several processes, which meet on this machine."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    command = [sys.executable, "-m", "benchmarks.checkpoint_speed", *sys.argv[1:]]
    running = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)
    ]
    statuses = [process.wait() for process in running]
    if any(statuses):
        sys.exit("a process has failed")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _measure(world: World, scratch: Path, asked: argparse.Namespace) -> Measured:
    """The times of every part in every round, on every process."""
    rows = _ROWS // world.size if asked.sharded else _ROWS
    tensors = {f"weight-{number}": torch.rand(rows, _COLUMNS) for number in range(max(1, asked.mb * 1_000_000 // (4 * _ROWS * _COLUMNS)))}
    copies, beside = Snapshot(), world.beside(timedelta(hours=1))
    copies.begin(tensors)
    copies.hold_back()  # a run keeps the memory of its first save
    products = _products_of(asked.passes)
    rounds: list[dict[str, tuple[float, float]]] = []

    def note(name: str, work: Callable[[], Any]) -> None:
        world.barrier()
        rounds[-1][name] = _timed(work)

    with writer_thread() as thread:
        for number in range(1, asked.rounds + 1):
            rounds.append({})
            in_loop, in_background = (RunPaths(scratch / f"{number}-{name}", "20260101-000000-brisk-otter") for name in ("loop", "beside"))
            if world.is_main:
                in_loop.root.mkdir()
                in_background.root.mkdir()
            note("save in the loop", lambda run=in_loop: _save(beside, run, tensors, sharded=asked.sharded))
            note("verify", lambda run=in_loop: manifest.verify(run.checkpoint(1)) if world.is_main else None)
            note("passes", lambda: _compute(products))
            note("begin a save in the background", lambda: copies.begin(tensors))
            written = thread.submit(lambda run=in_background: _save(beside, run, copies.copies(), sharded=asked.sharded))
            note("passes beside the copy", lambda: _compute(products))
            note("before the update", copies.hold_back)
            written.result()
            for run in (in_loop, in_background) if world.is_main else ():
                shutil.rmtree(run.root)
    gathered = world.gather(rounds)
    return [{name: [each[number][name] for each in gathered] for name in rounds[0]} for number in range(len(rounds))]


def _report(world: World, rounds: list[dict[str, list[float]]], asked: argparse.Namespace) -> None:
    """Print medians over the rounds."""
    size = 4 * _ROWS * _COLUMNS * max(1, asked.mb * 1_000_000 // (4 * _ROWS * _COLUMNS))
    how = "" if world.size == 1 else f" of {world.size} processes, {'sharded' if asked.sharded else 'replicated'},"
    print(f"{size / 1e6:.0f} MB{how} load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, {torch.get_num_threads()} threads each")
    medians = {name: [statistics.median(each[name][part] for each in rounds) for part in (0, 1)] for name in rounds[0]}
    for name, (clock, processor) in medians.items():
        print(f"{name}: {clock:.3f} s; processor {processor:.3f} s")
    for part, what in enumerate(("clock", "processor time of all threads")):
        waits = [each["begin a save in the background"][part] + each["before the update"][part] for each in rounds]
        share = statistics.median(wait / each["save in the loop"][part] for wait, each in zip(waits, rounds, strict=True))
        print(f"the loop waits {share:.1%} of a save in the loop ({what})")
    clock, processor = medians["verify"]
    print(f"verification: {size / 1e6 / clock:,.0f} MB/s; {size / 1e6 / processor:,.0f} MB per second of processor time")


def _products_of(seconds: float) -> int:
    """How many products of `_compute` take so long here."""
    _compute(2)
    return max(1, int(seconds / _timed(lambda: _compute(8))[0] * 8))


def _compute(products: int) -> None:
    side = torch.ones(1024, 1024)
    for _ in range(products):
        side = side @ side / 1024


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def _save(world: World, run: RunPaths, tensors: dict[str, torch.Tensor], *, sharded: bool) -> None:
    state = TrainerState(
        step=1,
        consumed=32,
        tokens=1000,
        targets=240,
        bad_steps=0,
        best_loss=None,
        best_step=None,
        evaluations_without_gain=0,
        elapsed_s=1.0,
        micro_batch_tokens=2048,
    )
    names, pieces = sorted(tensors), {name: _whole(world, each) if sharded else each for name, each in tensors.items()}
    weights, moments = ({name: pieces[name] for name in part} for part in (names[: len(names) // 3], names[len(names) // 3 :]))
    save_together(
        world,
        run,
        state=state,
        config_text="",
        fingerprints=Fingerprints("d" * 64, "b" * 64),
        writes={
            "model": lambda folder, share: write_files(folder, "model", weights, part=share).mine,
            "optimizer": lambda folder, share: write_files(folder, "optimizer", moments, part=share).mine,
        },
        optimizer_values={},
        needed=lambda: sum(each.nbytes for each in pieces.values()),
    )


def _whole(world: World, rows: torch.Tensor) -> TensorSlices:
    counts = [len(rows)] * world.size
    return TensorSlices(rows.nbytes * world.size, lambda to: collect(world, rows, counts, first=0, to=to))


if __name__ == "__main__":
    main()
