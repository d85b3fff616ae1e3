"""The start part: what a user waits for before, beside and after the steps.

Seconds from the start of a process to the end of its first and its twentieth step, and its peak memory; a resumed run to its first step;
what a checkpoint costs the loop; rows prepared a second. llamahome reads and tokenizes its rows in this time, the peers get theirs as
token ids.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.client import ROOT, SystemFailed, Trainer, environment
from benchmarks.environments import NotInstalled, python_of
from benchmarks.figures import spread
from benchmarks.peers import ours
from benchmarks.results import PARTS
from benchmarks.rows import scenario
from benchmarks.speed import make_rows, rotated, say, task_of
from benchmarks.systems import System

BATCH = 2
"""Rows of a step here: start-up and not the steps are measured."""
_STEPS = 20
_SAVED_STEPS, _SAVED_EVERY = 12, 2
_DEFAULT_INTERVAL_S = 600.0
"""checkpoint.every is "10 min"."""
_PREPARED_ROWS = 8000


def measure(systems: Sequence[System], *, rounds: int, cache: Path, model: str) -> dict[str, Any]:
    """All of it for LoRA on docstrings."""
    folder, one = cache / "work/start", scenario("docstrings")
    shutil.rmtree(folder, ignore_errors=True)
    make_rows(one, folder / "data", rows=_STEPS * BATCH, model=model)
    tasks = {each.name: task_of(each, one, "lora", data=folder / "data", model=model, batch=BATCH) for each in systems}
    peers = {each.name: each for each in systems}
    found: dict[str, Any] = {each.name: {"title": each.title, "cold": None, "rounds": []} for each in systems}
    for number in range(rounds + 1):
        for name in rotated(list(found), number):
            if "error" in found[name]:
                continue
            try:
                taken = _once(peers[name], tasks[name], folder / name, cache)
            except (SystemFailed, NotInstalled) as error:
                found[name]["error"] = str(error)
                say(f"  start: {name}: {error}")
                continue
            say(f"  start: {name} first step after {taken['first']:.1f} s, twentieth after {taken['twentieth']:.1f} s")
            if number:
                found[name]["rounds"].append(taken)
            else:
                found[name]["cold"] = taken
    told: dict[str, Any] = {"systems": found, "steps": _STEPS, "batch": BATCH}
    if "ours" in tasks:
        told |= {"resume": _resume(tasks["ours"], folder / "resume", rounds), "checkpoint": _checkpoint(tasks["ours"], folder / "saves")}
    told["preparation"] = _preparation(cache, model)
    return told


def _once(one: System, task: Mapping[str, Any], folder: Path, cache: Path) -> dict[str, Any]:
    trainer = Trainer(python_of(one.peer, cache), one.peer, task, folder)
    try:
        first, twentieth, told = trainer.start(1, _STEPS - 1)
    finally:
        trainer.close()
    return {"first": first, "twentieth": twentieth, "peak": told["peak"]}


def _train(task: Mapping[str, Any], folder: Path, *more: str) -> None:
    """`llamahome train` from beginning to end."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "llamahome", *ours.words(dict(task)), *more]
    with (folder / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(words, cwd=folder, env=environment(), stdout=log, stderr=log, check=False)
    if done.returncode:
        raise SystemFailed((folder / "log").read_text(encoding="utf-8").strip().splitlines()[-1])


def _resume(task: Mapping[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the start of `train-resume` to the end of its first step."""
    try:
        _train(task, folder, "--max-steps", "2", "--output", "run")
        taken = []
        for _ in range(rounds):
            trainer = Trainer(sys.executable, "ours", {**task, "resume": "run"}, folder)
            try:
                taken.append(trainer.start(1, 0)[0])
            finally:
                trainer.close()
    except SystemFailed as error:
        return {"error": str(error)}
    say(f"  resume: first step after {statistics.median(taken):.1f} s")
    return spread(taken).told()


def _checkpoint(task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds that the loop stands still for a checkpoint, from the run's own metrics."""
    every = ("--set", f"checkpoint.every={_SAVED_EVERY} steps", "--max-steps", str(_SAVED_STEPS))
    try:
        _train({**task, "batch": scenario("docstrings").batch}, folder, *every)
    except SystemFailed as error:
        return {"error": str(error)}
    records = metrics_in(folder)
    return {**stall(records, every=_SAVED_EVERY), "parts": parts(records)}


def metrics_in(folder: Path) -> list[dict[str, Any]]:
    """Every record of the newest run whose process worked in `folder`."""
    files = sorted(folder.glob("data/metrics/logs/*/metrics.jsonl"))
    return [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()] if files else []


def parts(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each part of a step, the median over all steps but the first two."""
    steps = [each for each in records if "time/forward" in each][2:]
    return {name: statistics.median(each.get(f"time/{name}", 0.0) for each in steps) for name in PARTS} if steps else {}


def stall(records: Sequence[Mapping[str, Any]], *, every: int) -> dict[str, Any]:
    """What a save after every so many steps costs: `seconds` the loop waits, also for telling of it later on.

    `of_a_step` is their share of one step's time, `of_training` that of all time at the default interval; `beside` is by what share a token
    of a step that begins with a save takes longer besides, because the files are written meanwhile.
    """
    steps = [each for each in records if "time/forward" in each]
    saves = [each["step"] > every and each["step"] % every == 1 % every for each in steps]
    waited = sum(each.get("time/save", 0.0) for each in steps)
    if not any(saves) or not waited:
        return {"error": "no save stands in the metrics"}
    apart = ("time/save", "time/evaluate")
    taken = [sum(value for name, value in each.items() if name.startswith("time/") and name not in apart) for each in steps]
    seconds, step = waited / sum(saves), statistics.median(taken)
    totals = [0, *(each["train/tokens"] for each in steps)]
    by_token = [one / (after - before) for one, before, after in zip(taken, totals, totals[1:], strict=False)]
    beside = [one for one, saved in zip(by_token, saves, strict=True) if saved]
    alone = [one for one, saved in zip(by_token, saves, strict=True) if not saved]
    told = {
        "seconds": seconds,
        "saves": sum(saves),
        "step": step,
        "of_a_step": seconds / step,
        "of_training": seconds / _DEFAULT_INTERVAL_S,
    }
    return told | {"beside": statistics.median(beside) / statistics.median(alone) - 1}


def _preparation(cache: Path, model: str) -> dict[str, Any]:
    """Rows tokenized a second beside TRL's own code, by tokenize_speed.py, in TRL's environment of this benchmark."""
    try:
        venv = Path(python_of("trl", cache)).parents[1]
    except NotInstalled as error:
        return {"error": str(error)}
    (venv / "ready").touch()
    words = [
        sys.executable,
        str(ROOT / "benchmarks/tokenize_speed.py"),
        "--model",
        model,
        "--rows",
        str(_PREPARED_ROWS),
        "--venv",
        str(venv),
    ]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no word why"])[-1]}
    told = json.loads(done.stdout)
    say(f"  preparation: {told['rows_per_s']}")
    return {name: told[name] for name in ("rows", "rows_per_s", "times_as_fast_as", "processors")}
