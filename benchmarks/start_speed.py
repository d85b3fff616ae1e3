"""How long a start takes, from the process to the first step and its checkpoint: prints one JSON object.

    python benchmarks/start_speed.py --project DIR [--data data/training/raw] [--rounds 5]

DIR is a project folder with a base model and rows: after `make train` the folder itself, where nothing is left behind. Each round runs
`llamahome train DATA --max-steps 1` with one row in the step, without held-out rows (an evaluation before the first step is wanted) and
without sample answers. The first round fills the caches and does not count. Then the imports alone, in a process of their own.
Medians; for the imports two figures: seconds of the clock, and of all processors (user and system together).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_SETTINGS = ("training.batch_size=1", "data.eval_split=0", "evaluation.sample_prompts=0", "checkpoint.every=1000 steps")
_PARTS = {
    "imports_s": "import llamahome.pipeline",
    "of_which_torch_s": "import torch",
    "help_s": "import sys; sys.argv = ['llamahome', '--help']; from llamahome.cli.app import main; main()",
}


def timed(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processors that a command took; SystemExit with what it said when it failed."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    clock, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start(folder: Path, data: str) -> dict[str, float]:
    """One start: until the first checkpoint stands, and until the process is gone."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="start-speed-") as output:
        words = [sys.executable, "-m", "llamahome", "train", data, "--max-steps", "1", "--output", f"{output}/run"]
        begin = time.time()
        clock, processors = timed([*words, *(word for setting in _SETTINGS for word in ("--set", setting))], folder)
        reached = Path(output, "run", "checkpoint-1").stat().st_mtime - begin
    return {"first_step_s": reached, "whole_command_s": clock, "processor_s": processors}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--project", type=Path, required=True, help="a folder with data/models/base and rows")
    parser.add_argument("--data", default="data/training/raw")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    folder = given.project.resolve()
    rounds = [start(folder, given.data) for _ in range(given.rounds + 1)][1:]
    results: dict[str, object] = {name: round(statistics.median(each[name] for each in rounds), 2) for name in rounds[0]}
    for name, code in _PARTS.items():
        times = [timed([sys.executable, "-c", code], folder) for _ in range(given.rounds)]
        results[name] = [round(statistics.median(column), 2) for column in zip(*times, strict=True)]
    print(json.dumps({**results, "rounds": given.rounds, "load": os.getloadavg()[0]}, indent=2))


if __name__ == "__main__":
    main()
