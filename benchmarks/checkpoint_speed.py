"""Measures checkpoints: how fast they are verified, and how long the loop waits for one in the background compared with one in the loop.

python -m benchmarks.checkpoint_speed FOLDER [--mb 1000] [--rounds 5]

FOLDER should be on the disk where runs are saved; what is written there is removed. Both ways take turns, and medians are printed: time on
the clock, and time of the processor, which a busy machine changes less.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamahome.checkpoint import manifest
from llamahome.checkpoint.background import Snapshot
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
    asked = parser.parse_args()
    tensors = {f"weight-{number}": torch.rand(_EACH) for number in range(max(1, asked.mb * 1_000_000 // (4 * _EACH)))}
    size = sum(tensor.nbytes for tensor in tensors.values())
    copies = Snapshot()
    copies.take(tensors)  # a run keeps the memory of its first save
    times: dict[str, list[tuple[float, float]]] = {"save in the loop": [], "copy for a save in the background": [], "verify": []}
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        for number in range(1, asked.rounds + 1):
            run = RunPaths(Path(scratch, str(number)), "20260101-000000-brisk-otter")
            run.root.mkdir()
            times["save in the loop"].append(_timed(lambda run=run: _save(run, tensors, size)))
            times["copy for a save in the background"].append(_timed(lambda: copies.take(tensors)))
            times["verify"].append(_timed(lambda run=run: manifest.verify(run.checkpoint(1))))
    medians = {name: [statistics.median(each) for each in zip(*rounds, strict=True)] for name, rounds in times.items()}
    for name, (clock, processor) in medians.items():
        print(f"{name}: {size / 1e6:.0f} MB in {clock:.3f} s, {size / 1e6 / clock:,.0f} MB/s; processor {processor:.3f} s")
    saved, copied, verified = medians.values()
    shares = statistics.median(copy[0] / save[0] for save, copy in zip(*list(times.values())[:2], strict=True))
    print(f"the loop waits {shares:.1%} of a save in the loop (processor time: {copied[1] / saved[1]:.1%})")
    print(f"verification per second of processor time: {size / 1e6 / verified[1]:,.0f} MB")


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
    save_together(
        World(0, 1, 0, torch.device("cpu")),
        run,
        state=state,
        config_text="",
        fingerprints=Fingerprints("d" * 64, "b" * 64),
        writes={"optimizer": lambda folder, share: write_files(folder, "optimizer", tensors, part=share).mine},
        optimizer_values={},
        needed=size,
    )


if __name__ == "__main__":
    main()
