"""llamahome's own `train`, as users type it; only its loader waits for its turn before it gives out a step."""

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


def words(given: dict[str, Any]) -> list[str]:
    """The command line of this task."""
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
    told = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["train", given["data"], "--model", given["model"], "--method", given["method"], "--epochs", "1", *told]


def _last_loss() -> float | None:
    """Of the step that has just ended, from the metrics of the run in this folder."""
    files = sorted(Path("data/metrics/logs").glob("*/metrics.jsonl"))
    lines = files[-1].read_text(encoding="utf-8").splitlines() if files else []
    found = [json.loads(line) for line in lines[-3:] if "train/loss" in line]
    return float(found[-1]["train/loss"]) if found else None


def _peak(bf16: bool) -> dict[str, Any]:
    """The machine's own rate: torch's bfloat16 product, or in float32 OpenBLAS's, because torch's own is slower on some processors."""
    if not bf16:
        return {"peak_flops": max(product_rate() for _ in range(3))}
    import torch

    from llamahome.monitoring.throughput import measured_peak_flops

    return {"peak_flops": max(measured_peak_flops(torch.device("cpu"), torch.bfloat16) for _ in range(5))}


def _feed(turn: Turn, microbatch: "Microbatch") -> None:
    ids = microbatch.tokens_T.tolist()
    learned = [False] * len(ids)
    for row in microbatch.rows_N.tolist():
        learned[row + 1] = True
    begin = 0
    for length in microbatch.lengths:
        turn.fed.row(ids[begin : begin + length], learned[begin : begin + length])
        begin += length


def run() -> None:
    """Train in turns."""
    given = task()
    turn = Turn()
    turn.command("peak", lambda: _peak(given["bf16"]))
    with importing_torch():
        from llamahome import pipeline  # noqa: F401
        from llamahome.data.steps.loader import Loader

    take = Loader.__next__

    def in_turn(loader: Loader) -> "list[Microbatch]":
        turn.between(_last_loss())
        microbatches = take(loader)
        for microbatch in microbatches:
            _feed(turn, microbatch)
        return microbatches

    Loader.__next__ = in_turn  # type: ignore[method-assign, assignment]
    sys.argv = ["llamahome", *words(given)]
    main()


if __name__ == "__main__":
    run()
