"""Measures what recording costs per step: the recorder with its file, the alerts, and a sample of the machine; prints one JSON object.

    python benchmarks/recording_cost.py [--steps 2000] [--rounds 5]

Each round writes the same lines with and without alerts, in turns, into a scratch folder. A figure is the median of the rounds, in
microseconds of processor time of this process, which other work on the machine changes little.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llamahome.monitoring.alerts import AlertSink, Watch
from llamahome.monitoring.episodes import Facts
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.resources import ResourceSampler

_PARTS = {"data": 0.001, "forward": 0.3, "backward": 0.6, "exchange": 0.0, "update": 0.02}
_FACTS = Facts(run="latest", data="x", horizon=10_000, learning_rate=2e-4, max_grad_norm=1.0, micro_batch_tokens=4096)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"recorder": [], "recorder and alerts": [], "sample of the machine": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            found["recorder"].append(_recorded(Path(folder) / "plain", options.steps, alerts=False))
            found["recorder and alerts"].append(_recorded(Path(folder) / "watched", options.steps, alerts=True))
            sampler = ResourceSampler(Path(folder) / "system.jsonl", every=3600)
            found["sample of the machine"].append(_microseconds(sampler._sample, 200))
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    print(json.dumps({"microseconds": medians, "rounds": found}, indent=2))


def _recorded(folder: Path, steps: int, *, alerts: bool) -> float:
    recorder = Recorder(
        folder, tensorboard_dir=None, is_main=True, resume_step=None, flops_per_token=1e9, peak_flops=1e12, warn=lambda text: None
    )
    if alerts:
        sample = {"system/ram": 0.5, "system/disk_free": 1e11, "memory/rss": 1e9, "memory/swap": 0.0}
        recorder.attach(AlertSink(Watch(_FACTS), lambda alert: None, system=lambda: sample))
    loss, norm, step = torch.tensor(2.5), torch.tensor(0.7), 0

    def one() -> None:
        nonlocal step
        step += 1
        recorder.record(step, loss=loss, grad_norm=norm, learning_rate=1e-4, tokens=1000, targets=250)
        window = recorder.cut(step)
        assert window is not None
        recorder.write(window, _PARTS)

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
