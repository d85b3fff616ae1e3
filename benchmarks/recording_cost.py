"""Measures what recording costs per step: the recorder with its files, alerts, TensorBoard, the lines of a log; prints one JSON object.

    PYTHONPATH=src python benchmarks/recording_cost.py [--steps 2000] [--rounds 5]

Each part is added to those before it, so the last figure is what a run with default settings takes off a terminal. Each round writes the
same lines, part by part in turns, into a scratch folder. A figure is the median of the rounds, in microseconds of processor time of this
process, which other work on the machine changes little; of all rounds the least is printed too. "a sample of the machine" is taken every
two seconds in a thread of its own.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llamahome.monitoring.alerts import AlertSink, Watch
from llamahome.monitoring.display import RunSummary
from llamahome.monitoring.episodes import Facts
from llamahome.monitoring.plain import PlainProgress
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.resources import ResourceSampler

_PARTS = {"data": 0.001, "forward": 0.3, "backward": 0.6, "exchange": 0.0, "update": 0.02}
_FACTS = Facts(run="latest", data="x", horizon=10_000, learning_rate=2e-4, slower_rate=1e-4, max_grad_norm=1.0, micro_batch_tokens=4096)
_SAMPLE = {"system/ram": 0.5, "system/disk_free": 1e11, "memory/rss": 1e9, "memory/swap": 0.0}
_ADDED = ("metrics.jsonl", "and alerts", "and TensorBoard", "and the lines of a log")
_SUMMARY = RunSummary(
    run_id="20261129-100000-cost",
    model="tiny",
    method="lora",
    trained_share=0.01,
    train_rows=1000,
    eval_rows=0,
    mean_tokens=100.0,
    target_share=0.25,
    batch_size=10,
    tokens_per_step=1000.0,
    micro_batch_tokens=4096,
    processes=1,
    horizon=10_000,
    epochs=100.0,
    folder="output/runs/cost",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in (*_ADDED, "a sample of the machine")}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for count, name in enumerate(_ADDED):
                found[name].append(_recorded(Path(folder) / str(count), options.steps, parts=count))
            sampler = ResourceSampler(Path(folder) / "system.jsonl", every=3600)
            found["a sample of the machine"].append(_microseconds(sampler._sample, 200))
    figures = {name: {"median": round(statistics.median(values), 1), "least": round(min(values), 1)} for name, values in found.items()}
    print(json.dumps({"microseconds": figures, "load": round(_load(), 1)}, indent=2))


def _load() -> float:
    return float(Path("/proc/loadavg").read_text(encoding="ascii").split()[0]) if Path("/proc/loadavg").exists() else float("nan")


def _recorded(folder: Path, steps: int, *, parts: int) -> float:
    recorder = Recorder(
        folder,
        tensorboard_dir=folder / "tensorboard" if parts >= 2 else None,
        is_main=True,
        resume_step=None,
        flops_per_token=1e9,
        peak_flops=1e12,
        warn=lambda text: None,
        system=lambda: _SAMPLE,
    )
    if parts >= 1:
        recorder.attach(AlertSink(Watch(_FACTS), lambda alert: None, system=lambda: _SAMPLE))
    progress = PlainProgress(io.StringIO())
    progress.start(_SUMMARY)
    loss, norm, step = torch.tensor(2.5), torch.tensor(0.7), 0

    def one() -> None:
        nonlocal step
        step += 1
        recorder.record(step, loss=loss, grad_norm=norm, learning_rate=1e-4, tokens=1000, targets=250)
        window = recorder.cut(step)
        assert window is not None
        metrics = recorder.write(window, _PARTS)
        if parts >= 3:
            progress.update(step, metrics)

    one()  # imports and tables
    try:
        return _microseconds(one, steps)
    finally:
        recorder.close()


def _microseconds(run: Callable[[], object], count: int) -> float:
    started = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - started) / count * 1e6


if __name__ == "__main__":
    main()
