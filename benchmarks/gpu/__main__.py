"""`make bench-gpu`, or `python -m benchmarks.gpu`: correctness, speed and memory on one GPU, in at most ten minutes.

    make bench-gpu                                        on the first GPU
    make bench-gpu ARGS="--device cpu --toy"              the same parts with a toy shape on a processor, as CI runs them
    make bench-gpu ARGS="--part 8b --part memory"         some parts

Weights are random in real shapes, so nothing is downloaded. Each part runs in a process of its own, in order of worth, and each
result is printed and written as one JSON line the moment it is known: what is cut off loses only the rest. A part that fails or
runs out of memory says so and the next one starts. Results go to benchmarks/results/<date>-<device>.jsonl.
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
_STARTED = "benchmarks.gpu.worker"


def arguments(words: list[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --toy")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for a smoke run anywhere")
    parser.add_argument("--part", action="append", choices=PARTS, help="one part; several times for several")
    parser.add_argument("--seconds", type=float, default=_LIMIT_S, help="no part starts, and none goes on, after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the results")
    given = parser.parse_args(words)
    if given.device != "cuda" and not given.toy:
        parser.error("--device cpu needs --toy: the real shapes take hours there")
    return given


class Results:
    """One JSON line each, on the screen and in the file at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def tell(self, found: dict[str, Any]) -> None:
        """Write one result."""
        line = json.dumps(found)
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def run_part(part: str, given: argparse.Namespace, results: Results, *, seconds: float) -> bool:
    """Run one part in a process of its own; returns whether all that it found was good."""
    command = [sys.executable, "-m", _STARTED, part, given.device, *(["toy"] if given.toy else [])]
    good, pipes = True, {"stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=errors, start_new_session=True, **pipes)  # type: ignore[call-overload]
        late = threading.Timer(seconds, _end, [process])
        late.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    found = json.loads(line)
                    good &= found.get("ok", True)
                    results.tell({"part": part, **found})
            process.wait()
        finally:
            late.cancel()
            _end(process)
            process.stdout.close()
            process.wait()
        if process.returncode == 0:
            return good
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no word"])[-1][:300]
    results.tell({"part": part, "ok": False, "error": f"cut off after {seconds:.0f} s" if process.returncode < 0 else last})
    return False


def _end(process: "subprocess.Popen[str]") -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main(words: list[str]) -> int:
    """Measure and write; returns 1 when a part failed or was not reached."""
    given = arguments(words)
    device = given.device + ("-toy" if given.toy else "")
    results = Results(given.out / f"{datetime.date.today().isoformat()}-{device}.jsonl")
    started, good = time.perf_counter(), run_part("machine", given, results, seconds=120)
    for part in given.part or PARTS:
        left = given.seconds - (time.perf_counter() - started)
        if left < 5:
            results.tell({"part": part, "ok": False, "error": f"not started: {given.seconds:.0f} s are over"})
            good = False
            continue
        good &= run_part(part, given, results, seconds=left)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
