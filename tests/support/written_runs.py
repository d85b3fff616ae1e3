"""Files of a run as a training leaves them, without training: for tests of what reads them."""

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from llamahome.monitoring.display import RunSummary, write_summary
from llamahome.rundir import RUNS, RunPaths

BEGAN = 1_790_000_000.0
CONFIG = """\
# Every setting of this run and where its value came from.
model:
  name: tiny  # --model
training:
  batch_size: {batch_size}  # --set
  learning_rate: {learning_rate}  # auto: lora of hidden size 64
"""


def summary_of(run_id: str, *, steps: int) -> RunSummary:
    return RunSummary(
        run_id=run_id,
        model="tiny",
        method="lora",
        trained_share=0.04,
        train_rows=96,
        eval_rows=8,
        mean_tokens=120.0,
        target_share=0.25,
        batch_size=8,
        tokens_per_step=960.0,
        micro_batch_tokens=512,
        processes=1,
        horizon=steps,
        epochs=2.0,
        folder=f"output/runs/{run_id}",
    )


def metrics_of(step: int, *, loss: float | None = None) -> dict[str, Any]:
    return {
        "t": BEGAN + 2.0 * step,
        "step": step,
        "train/loss": 1.5 + math.exp(-step / 20) if loss is None else loss,
        "train/grad_norm": 1.0 + step % 3 / 10,
        "train/learning_rate": 1e-3 / step,
        "train/tokens": 960 * step,
        "train/targets": 240 * step,
        "speed/tokens_per_s": 480.0,
        "time/forward": 1.0,
        "time/backward": 1.0,
        "memory/rss": 2e9,
        "memory/peak": 2.5e9,
    }


def evaluation_of(step: int, loss: float) -> dict[str, Any]:
    return {"t": BEGAN + 2.0 * step, "step": step, "eval/loss": loss, "eval/perplexity": math.exp(loss), "eval/token_accuracy": 0.5}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def write_status(paths: RunPaths, state: str, step: int, horizon: int, **fields: Any) -> None:
    record = {"state": state, "step": step, "horizon": horizon, "pid": os.getpid(), "host": socket.gethostname(), "t": time.time()}
    (paths.metrics_dir / "status.json").write_text(json.dumps({**record, "folder": str(paths.root.resolve()), **fields}))


def write_run(
    run_id: str = "20260101-000000-amber-finch",
    *,
    steps: int = 40,
    horizon: int | None = None,
    state: str = "finished",
    batch_size: int = 8,
    learning_rate: float = 0.001,
    checkpoint: bool = True,
    losses: dict[int, float | None] | None = None,
) -> RunPaths:
    """A run with all of its files in the current folder; `losses` replaces the loss of some steps, None is one that was not finite."""
    paths = RunPaths(RUNS / run_id, run_id)
    paths.root.mkdir(parents=True)
    (paths.root / "run_id").write_text(run_id + "\n")
    paths.config.write_text(CONFIG.format(batch_size=batch_size, learning_rate=learning_rate))
    command = ["/opt/bin/llamahome", "train", "my chats.jsonl"]
    paths.environment.write_text(
        json.dumps({"command": command, "python": "3.12.1", "memory_bytes": 2**33, "packages": {"torch": "2.13.0"}})
    )
    records: list[dict[str, Any]] = [evaluation_of(0, 3.0)]
    for step in range(1, steps + 1):
        records.append(metrics_of(step))
        if losses and step in losses:
            records[-1]["train/loss"] = losses[step]
        if step % max(1, steps // 4) == 0:
            records.append(evaluation_of(step, 1.8 + abs(step - steps / 2) / steps))
    write_lines(paths.metrics_dir / "metrics.jsonl", records)
    events = [{"t": BEGAN, "kind": "started", "step": 0, "horizon": horizon or steps}]
    if checkpoint:
        paths.checkpoint(steps).mkdir()
        events.append({"t": BEGAN + 2 * steps, "kind": "saved", "step": steps, "folder": f"checkpoint-{steps}"})
    write_lines(paths.metrics_dir / "events.jsonl", events)
    samples = [{"t": BEGAN, "step": step, "prompt": "Which day?", "answer": f"Day {step}.", "reference": "Monday."} for step in (0, 20, 40)]
    write_lines(paths.metrics_dir / "samples.jsonl", samples)
    write_summary(paths.metrics_dir, summary_of(run_id, steps=horizon or steps))
    write_status(paths, state, steps, horizon or steps, t=time.time() if state == "running" else BEGAN + 2.0 * steps)
    return paths
