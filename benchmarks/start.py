"""The start part: times besides the steps.

Seconds from the start of a process to the end of its first and its twentieth step, and its peak memory; from the start of a resumed run to
its first step; the cost of a checkpoint for the training loop; prepared rows per second. llamahome reads and tokenizes its rows in this
time; the peers get token ids.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.client import ROOT, SystemFailed, TrainerProcess, environment
from benchmarks.environments import NotInstalled, python_of
from benchmarks.figures import spread
from benchmarks.peers import ours
from benchmarks.results import PARTS
from benchmarks.rows import scenario
from benchmarks.speed import make_rows, rotate, say, task_of
from benchmarks.systems import System

BATCH = 2
"""Rows per step: few, because the start is measured and not the steps."""
_STEPS = 20
_SAVED_STEPS, _SAVED_EVERY = 12, 2
_DEFAULT_INTERVAL_S = 600.0
"""checkpoint.every is "10 min"."""
_PREPARED_ROWS = 8000


def measure(systems: Sequence[System], *, rounds: int, cache: Path, model: str) -> dict[str, Any]:
    """Measure the start part for LoRA on docstrings."""
    folder, one = cache / "work/start", scenario("docstrings")
    shutil.rmtree(folder, ignore_errors=True)
    make_rows(one, folder / "data", rows=_STEPS * BATCH, model=model)
    tasks = {each.name: task_of(each, one, "lora", data=folder / "data", model=model, batch=BATCH) for each in systems}
    peers = {each.name: each for each in systems}
    results: dict[str, Any] = {each.name: {"title": each.title, "cold": None, "rounds": []} for each in systems}
    for number in range(rounds + 1):
        for name in rotate(list(results), number):
            if "error" in results[name]:
                continue
            try:
                times = _start_once(peers[name], tasks[name], folder / name, cache)
            except (SystemFailed, NotInstalled) as error:
                results[name]["error"] = str(error)
                say(f"  start: {name}: {error}")
                continue
            say(f"  start: {name} first step after {times['first']:.1f} s, twentieth after {times['twentieth']:.1f} s")
            if number:
                results[name]["rounds"].append(times)
            else:
                results[name]["cold"] = times
    result: dict[str, Any] = {"systems": results, "steps": _STEPS, "batch": BATCH}
    if "ours" in tasks:
        result |= {"resume": _resume(tasks["ours"], folder / "resume", rounds), "checkpoint": _checkpoint(tasks["ours"], folder / "saves")}
    result["preparation"] = _preparation(cache, model)
    return result


def _start_once(one: System, task: Mapping[str, Any], folder: Path, cache: Path) -> dict[str, Any]:
    trainer = TrainerProcess(python_of(one.peer, cache), one.peer, task, folder)
    try:
        first, twentieth, measured = trainer.time_start(1, _STEPS - 1)
    finally:
        trainer.close()
    return {"first": first, "twentieth": twentieth, "peak": measured["peak"]}


def _train(task: Mapping[str, Any], folder: Path, *more: str) -> None:
    """Run `llamahome train` until it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "llamahome", *ours.words(dict(task)), *more]
    with (folder / "log").open("w", encoding="utf-8") as log:
        result = subprocess.run(command, cwd=folder, env=environment(), stdout=log, stderr=log, check=False)
    if result.returncode:
        raise SystemFailed((folder / "log").read_text(encoding="utf-8").strip().splitlines()[-1])


def _resume(task: Mapping[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the start of `train-resume` to the end of its first step."""
    try:
        _train(task, folder, "--max-steps", "2", "--output", "run")
        seconds = []
        for _ in range(rounds):
            trainer = TrainerProcess(sys.executable, "ours", {**task, "resume": "run"}, folder)
            try:
                seconds.append(trainer.time_start(1, 0)[0])
            finally:
                trainer.close()
    except SystemFailed as error:
        return {"error": str(error)}
    say(f"  resume: first step after {statistics.median(seconds):.1f} s")
    return spread(seconds).as_dict()


def _checkpoint(task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds that the loop waits for a checkpoint, from the metrics of the run."""
    every = ("--set", f"checkpoint.every={_SAVED_EVERY} steps", "--max-steps", str(_SAVED_STEPS))
    try:
        _train({**task, "batch": scenario("docstrings").batch}, folder, *every)
    except SystemFailed as error:
        return {"error": str(error)}
    records = metrics_in(folder)
    return {**checkpoint_cost(records, every=_SAVED_EVERY), "parts": parts(records)}


def metrics_in(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of the newest run in `folder`."""
    files = sorted(folder.glob("data/metrics/logs/*/metrics.jsonl"))
    return [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()] if files else []


def parts(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of each part of a step, without the first two steps."""
    steps = [each for each in records if "time/forward" in each][2:]
    return {name: statistics.median(each.get(f"time/{name}", 0.0) for each in steps) for name in PARTS} if steps else {}


def checkpoint_cost(records: Sequence[Mapping[str, Any]], *, every: int) -> dict[str, Any]:
    """The cost of a checkpoint every `every` steps.

    `seconds`: how long the loop waits for it in total; `of_a_step`: that as a share of the time of a step; `of_training`: as a share of the
    default interval; `beside`: how much longer a token takes, relatively, in a step during which the files are written.
    """
    steps = [each for each in records if "time/forward" in each]
    saves = [each["step"] > every and each["step"] % every == 1 % every for each in steps]
    waiting = sum(each.get("time/save", 0.0) for each in steps)
    if not any(saves) or not waiting:
        return {"error": "the metrics have no checkpoint"}
    excluded = ("time/save", "time/evaluate")
    times = [sum(value for name, value in each.items() if name.startswith("time/") and name not in excluded) for each in steps]
    seconds, step = waiting / sum(saves), statistics.median(times)
    totals = [0, *(each["train/tokens"] for each in steps)]
    by_token = [one / (after - before) for one, before, after in zip(times, totals, totals[1:], strict=False)]
    beside = [one for one, saved in zip(by_token, saves, strict=True) if saved]
    without = [one for one, saved in zip(by_token, saves, strict=True) if not saved]
    cost = {
        "seconds": seconds,
        "saves": sum(saves),
        "step": step,
        "of_a_step": seconds / step,
        "of_training": seconds / _DEFAULT_INTERVAL_S,
    }
    return cost | {"beside": statistics.median(beside) / statistics.median(without) - 1}


def _preparation(cache: Path, model: str) -> dict[str, Any]:
    """Tokenized rows per second of llamahome and TRL, by tokenize_speed.py in the TRL environment of this benchmark."""
    try:
        venv = Path(python_of("trl", cache)).parents[1]
    except NotInstalled as error:
        return {"error": str(error)}
    (venv / "ready").touch()
    command = [
        sys.executable,
        str(ROOT / "benchmarks/tokenize_speed.py"),
        "--model",
        model,
        "--rows",
        str(_PREPARED_ROWS),
        "--venv",
        str(venv),
    ]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        return {"error": (result.stderr.strip().splitlines() or ["no output"])[-1]}
    rates = json.loads(result.stdout)
    say(f"  preparation: {rates['rows_per_s']}")
    return {name: rates[name] for name in ("rows", "rows_per_s", "times_as_fast_as", "processors")}
