"""Measures the time from the start of a process to its first step and checkpoint, new and resumed: prints one JSON object.

    python benchmarks/start_speed.py --project DIR [--data data/training/raw] [--rounds 5]

DIR is a project folder with a base model and rows, for example this one after `make train`; no files are left in it. Each round runs
`llamahome train DATA --max-steps 1` with one row in the step, without held-out rows (they would be evaluated before the first step) and
without sample answers, and then resumes that run for a second step. The first round fills the caches and does not count. The imports are
measured in separate processes. All values are medians; those of the imports are wall time and CPU time (user and system).
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


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall time and CPU time of a command in seconds. Raises SystemExit with its stderr if it fails."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode:
        sys.exit(result.stderr)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start(folder: Path, data: str) -> dict[str, float]:
    """One start and its resume, a step each: the time to the checkpoint and to the end of the process."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="start-speed-") as output:
        llamahome, run = [sys.executable, "-m", "llamahome"], Path(output, "run")
        settings = [word for setting in _SETTINGS for word in ("--set", setting)]
        begin = time.time()
        wall, cpu = timed([*llamahome, "train", data, "--max-steps", "1", "--output", str(run), *settings], folder)
        first_step = (run / "checkpoint-1").stat().st_mtime - begin
        begin = time.time()
        resumed_wall, resumed_cpu = timed([*llamahome, "train-resume", str(run), "--max-steps", "2"], folder)
        resumed_step = (run / "checkpoint-2").stat().st_mtime - begin
    times = {"first_step_s": first_step, "whole_command_s": wall, "processor_s": cpu}
    return times | {"resumed_step_s": resumed_step, "resumed_command_s": resumed_wall, "resumed_processor_s": resumed_cpu}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--project", type=Path, required=True, help="a folder with data/models/base and rows")
    parser.add_argument("--data", default="data/training/raw")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.project.resolve()
    rounds = [start(folder, options.data) for _ in range(options.rounds + 1)][1:]
    results: dict[str, object] = {name: round(statistics.median(each[name] for each in rounds), 2) for name in rounds[0]}
    for name, code in _PARTS.items():
        times = [timed([sys.executable, "-c", code], folder) for _ in range(options.rounds)]
        results[name] = [round(statistics.median(column), 2) for column in zip(*times, strict=True)]
    print(json.dumps({**results, "rounds": options.rounds, "load": os.getloadavg()[0]}, indent=2))


if __name__ == "__main__":
    main()
