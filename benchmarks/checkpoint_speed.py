"""Measures checkpoints: how fast they are verified, and how long the loop waits for one in the background compared with one in the loop.

python -m benchmarks.checkpoint_speed FOLDER [--mb 1000] [--rounds 5] [--passes 3]

FOLDER should be on the disk where runs are saved; what is written there is removed. The ways take turns, and medians are printed: time on
the clock, and time of the processor, which a busy machine changes less. A save in the background begins as in a run: the loop names the
tensors, computes for --passes seconds (matrix products on all threads, as a forward and backward pass), and before its update completes
the copies. What the loop waits is the beginning and what is left before the update.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamahome.checkpoint import manifest
from llamahome.checkpoint.background import Snapshot, writer_thread
from llamahome.checkpoint.collective_save import save_together
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.distributed.tensorfiles import write_files
from llamahome.distributed.world import World
from llamahome.rundir import RunPaths

_EACH = 4 << 20
"""Values of a tensor."""


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=float, default=3.0, help="seconds")
    asked = parser.parse_args()
    tensors = {f"weight-{number}": torch.rand(_EACH) for number in range(max(1, asked.mb * 1_000_000 // (4 * _EACH)))}
    size = sum(tensor.nbytes for tensor in tensors.values())
    copies = Snapshot()
    copies.begin(tensors)
    copies.hold_back()  # a run keeps the memory of its first save
    products = _products_of(asked.passes)
    times: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, work: Callable[[], Any]) -> None:
        times.setdefault(name, []).append(_timed(work))

    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch, writer_thread() as thread:
        for number in range(1, asked.rounds + 1):
            in_loop, beside = (_empty_run(Path(scratch), f"{number}-{name}") for name in ("loop", "beside"))
            note("save in the loop", lambda run=in_loop: _save(run, tensors, size))
            note("verify", lambda run=in_loop: manifest.verify(run.checkpoint(1)))
            note("passes", lambda: _compute(products))
            note("begin a save in the background", lambda: copies.begin(tensors))
            written = thread.submit(lambda run=beside: _save(run, copies.copies(), size))
            note("passes beside the copy", lambda: _compute(products))
            note("before the update", copies.hold_back)
            written.result()
    medians = {name: [statistics.median(each) for each in zip(*rounds, strict=True)] for name, rounds in times.items()}
    print(f"{size / 1e6:.0f} MB, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, {torch.get_num_threads()} threads")
    for name, (clock, processor) in medians.items():
        print(f"{name}: {clock:.3f} s; processor {processor:.3f} s")
    rounds = list(zip(*(times[name] for name in ("save in the loop", "begin a save in the background", "before the update")), strict=True))
    for number, what in enumerate(("clock", "processor time of all threads")):
        share = statistics.median((begin[number] + rest[number]) / save[number] for save, begin, rest in rounds)
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


def _empty_run(folder: Path, name: str) -> RunPaths:
    run = RunPaths(folder / name, "20260101-000000-brisk-otter")
    run.root.mkdir()
    return run


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def _save(run: RunPaths, tensors: dict[str, torch.Tensor], size: int) -> None:
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
    names = sorted(tensors)
    weights, moments = ({name: tensors[name] for name in part} for part in (names[: len(names) // 3], names[len(names) // 3 :]))
    save_together(
        World(0, 1, 0, torch.device("cpu")),
        run,
        state=state,
        config_text="",
        fingerprints=Fingerprints("d" * 64, "b" * 64),
        writes={
            "model": lambda folder, share: write_files(folder, "model", weights, part=share).mine,
            "optimizer": lambda folder, share: write_files(folder, "optimizer", moments, part=share).mine,
        },
        optimizer_values={},
        needed=lambda: size,
    )


if __name__ == "__main__":
    main()
