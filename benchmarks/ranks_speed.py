"""Measures the cost of several processes on one machine: one process with all threads against several with one thread each.

    python benchmarks/ranks_speed.py --model DIR --data FILE [--processes 2] [--steps 12] [--turns 3] [--set KEY=VALUE ...]

Prints one JSON object. Both train on the same rows for the same number of steps, with LoRA unless --set changes it. The result is real
tokens per second over the second half of the steps, the best of several alternating runs, so that a slow phase of the machine affects
both. The goal is a share of at least 0.85.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(arguments: argparse.Namespace, processes: int, folder: Path) -> dict[str, float]:
    """Run one training; return tokens per second over the second half of its steps, sent bytes, and the first loss."""
    threads = arguments.processes // processes
    command = [
        "train",
        str(Path(arguments.data).resolve()),
        "--model",
        str(Path(arguments.model).resolve()),
        "--output",
        str(folder / "run"),
    ]
    settings = ["data.eval_split=0", "evaluation.sample_prompts=0", "monitoring.tensorboard=false", "training.seed=1", *arguments.set]
    command += ["--max-steps", str(arguments.steps), "--world-size", str(processes), "--set", "training.batch_size=32"]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run([sys.executable, "-m", "llamahome", *command], cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    (path,) = folder.rglob("metrics.jsonl")
    steps = [record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "train/loss" in record]
    later = steps[len(steps) // 2 :]
    tokens = later[-1]["train/tokens"] - later[0]["train/tokens"]
    return {
        "tokens_per_s": tokens / (later[-1]["t"] - later[0]["t"]),
        "first_loss": steps[0]["train/loss"],
        "sent_per_step": later[-1].get("net/sent", 0.0),
        "exchange_s": sum(step.get("time/exchange", 0.0) for step in later) / len(later),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {1: [], arguments.processes: []}
    for _ in range(arguments.turns):
        for processes, turns in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                turns.append(run(arguments, processes, Path(folder)))
    best = {processes: max(turn["tokens_per_s"] for turn in turns) for processes, turns in runs.items()}
    share = best[arguments.processes] / best[1]
    print(json.dumps({"share": round(share, 3), "goal": 0.85, "steps": arguments.steps, "turns": runs}, indent=2))


if __name__ == "__main__":
    main()
