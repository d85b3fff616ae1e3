"""llamahome's `train` command; its loader waits for the next turn before each step."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.levels import product_rate
from benchmarks.peers.turn import Turn, task
from llamahome.cli.app import main
from llamahome.cli.train import importing_torch

if TYPE_CHECKING:
    from llamahome.data.records import Microbatch
    from llamahome.data.steps.loader import StepBatch


def words(given: dict[str, Any]) -> list[str]:
    """Return the command line of this task."""
    if "resume" in given:
        return ["train-resume", given["resume"], "--set", "training.max_steps=1000000"]
    settings = {
        "training.batch_size": given["batch"],
        "training.learning_rate": given["rate"],
        "training.schedule": "constant",
        "training.warmup": 0,
        "data.eval_split": 0,
        "data.max_length": given["max_length"],
        "data.max_lost_share": 1,
        "evaluation.sample_prompts": 0,
        "checkpoint.every": "1000000 steps",
        **given.get("settings", {}),
    }
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["train", given["data"], "--model", given["model"], "--method", given["method"], "--epochs", "1", *options]


def _last_loss() -> float | None:
    """Return the loss of the step that has just ended, from the metrics of the run in this folder."""
    files = sorted(Path("data/metrics/logs").glob("*/metrics.jsonl"))
    lines = files[-1].read_text(encoding="utf-8").splitlines() if files else []
    records = [json.loads(line) for line in lines[-3:] if "train/loss" in line]
    return float(records[-1]["train/loss"]) if records else None


def _peak(bf16: bool) -> dict[str, Any]:
    """Measure the machine's peak rate: torch's bfloat16 product, or OpenBLAS in float32, because torch's is slower on some CPUs."""
    if not bf16:
        return {"peak_flops": max(product_rate() for _ in range(3))}
    import torch

    from llamahome.monitoring.throughput import measured_peak_flops

    return {"peak_flops": max(measured_peak_flops(torch.device("cpu"), torch.bfloat16) for _ in range(5))}


def _feed(turn: Turn, microbatch: "Microbatch") -> None:
    ids = microbatch.tokens_T.tolist()
    is_target = [False] * len(ids)
    for row in microbatch.rows_N.tolist():
        is_target[row + 1] = True
    begin = 0
    for length in microbatch.lengths:
        turn.fed.row(ids[begin : begin + length], is_target[begin : begin + length])
        begin += length


def run() -> None:
    """Train, one turn after the other."""
    given = task()
    turn = Turn()
    turn.command("peak", lambda: _peak(given["bf16"]))
    with importing_torch():
        from llamahome import pipeline  # noqa: F401
        from llamahome.data.steps.loader import Loader

    take = Loader.__next__

    def in_turn(loader: Loader) -> "StepBatch":
        turn.between(_last_loss())
        batch = take(loader)
        for microbatch in batch.microbatches:
            _feed(turn, microbatch)
        return batch

    Loader.__next__ = in_turn  # type: ignore[method-assign, assignment]
    sys.argv = ["llamahome", *words(given)]
    main()


if __name__ == "__main__":
    run()
