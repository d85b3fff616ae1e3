"""`make bench-gpu`, or `python -m benchmarks.gpu`: checks correctness, speed and memory on one GPU, in at most ten minutes.

    make bench-gpu                                        on the first GPU
    make bench-gpu ARGS="--device cpu --toy"              the same parts with a toy shape on the CPU, as in CI
    make bench-gpu ARGS="--part 8b --part memory"         some parts

Weights are random in real shapes, so nothing is downloaded. Each part runs in its own process, the most important ones first. Each result
is printed and written as one JSON line at once, so an interruption only loses the rest. If a part fails or runs out of memory, the error is
a result and the next part starts. Results are written to benchmarks/results/<date>-<device>.jsonl.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.client import ROOT, environment

PARTS = ("correct", "1b", "8b", "memory", "resume", "ranks")
_LIMIT_S = 600.0
_WORKER = "benchmarks.gpu.worker"


def arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --toy")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for a smoke test on any machine")
    parser.add_argument("--part", action="append", choices=PARTS, help="run this part; may be repeated")
    parser.add_argument("--seconds", type=float, default=_LIMIT_S, help="stop after this time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results")
    options = parser.parse_args(words)
    if options.device != "cuda" and not options.toy:
        parser.error("--device cpu needs --toy: the real shapes take hours there")
    return options


class Results:
    """Writes each result as one JSON line to stdout and to the file at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, result: dict[str, Any]) -> None:
        """Write one result."""
        line = json.dumps(result)
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def run_part(part: str, options: argparse.Namespace, results: Results, *, seconds: float) -> bool:
    """Run one part in its own process; return whether all its checks passed."""
    command = [sys.executable, "-m", _WORKER, part, options.device, *(["toy"] if options.toy else [])]
    passed, pipes = True, {"stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=errors, start_new_session=True, **pipes)  # type: ignore[call-overload]
        timer = threading.Timer(seconds, _kill, [process])
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    result = json.loads(line)
                    passed &= result.get("ok", True)
                    results.write({"part": part, **result})
            process.wait()
        finally:
            timer.cancel()
            _kill(process)
            process.stdout.close()
            process.wait()
        if process.returncode == 0:
            return passed
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no output"])[-1][:300]
    results.write({"part": part, "ok": False, "error": f"cut off after {seconds:.0f} s" if process.returncode < 0 else last})
    return False


def _kill(process: "subprocess.Popen[str]") -> None:
    """Kill the process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main(words: list[str]) -> int:
    """Measure and write the results; return 1 if a part failed or was not started."""
    options = arguments(words)
    device = options.device + ("-toy" if options.toy else "")
    results = Results(options.out / f"{datetime.date.today().isoformat()}-{device}.jsonl")
    started, passed = time.perf_counter(), run_part("machine", options, results, seconds=120)
    for part in options.part or PARTS:
        left = options.seconds - (time.perf_counter() - started)
        if left < 5:
            results.write({"part": part, "ok": False, "error": f"not started: {options.seconds:.0f} s are over"})
            passed = False
            continue
        passed &= run_part(part, options, results, seconds=left)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
