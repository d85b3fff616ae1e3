"""The speed part: llamahome and one peer are loaded together and run the same steps alternately, for one peer after the other."""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.client import SystemFailed, TrainerProcess, environment
from benchmarks.environments import NotInstalled, python_of
from benchmarks.rows import Scenario
from benchmarks.systems import System

RATES = {"lora": 1.3e-3, "full": 1.3e-4}
"""llamahome's learning rates for the starter, used by all systems."""


@dataclass(frozen=True)
class Schedule:
    """How many steps are measured."""

    warmup: int = 2
    """Steps before the first round; the start part measures compilation and the first allocations."""
    rounds: int = 5
    steps: int = 1
    """Steps per round."""

    @property
    def all_steps(self) -> int:
        """Steps of each system."""
        return self.warmup + self.rounds * self.steps


def say(text: str) -> None:
    """Print progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def make_rows(scenario: Scenario, folder: Path, *, rows: int, model: str, skip: int = 0) -> dict[str, Any]:
    """Write the rows in another process, because this one must not load torch; return their counts."""
    folder.mkdir(parents=True, exist_ok=True)
    task = {"folder": str(folder), "rows": rows, "length": scenario.length, "max_length": scenario.max_length, "model": model, "skip": skip}
    (folder / "rows-task.json").write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.rows", str(folder / "rows-task.json")]
    result = subprocess.run(command, env=environment(), cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    counts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return counts


def task_of(system: System, scenario: Scenario, method: str, *, data: Path, model: str, batch: int | None = None) -> dict[str, Any]:
    """The task file of a system's process."""
    return {
        "model": model,
        "method": method,
        "data": str(data / "rows.jsonl"),
        "rows": str(data / "ids.jsonl"),
        "adapter": str(data / "adapter"),
        "batch": batch or scenario.batch,
        "max_length": scenario.max_length,
        "rate": RATES[method],
        **system.settings,
    }


def measure(
    systems: list[System], scenario: Scenario, method: str, schedule: Schedule, *, cache: Path, model: str
) -> dict[str, dict[str, Any]]:
    """Return the rounds of each system, or its error.

    Each peer alternates with llamahome only, because four trainers in memory slow each other down. A peer's `beside` are llamahome's
    rounds of this pair; llamahome's `rounds` are those of all pairs.
    """
    folder = cache / "work" / f"{scenario.name}-{method}"
    make_rows(scenario, folder / "data", rows=schedule.all_steps * scenario.batch, model=model)
    ours = [each for each in systems if each.name == "ours"]
    peers = [each for each in systems if each.name != "ours"]
    results: dict[str, dict[str, Any]] = {}
    for group in [[*ours, peer] for peer in peers] or [ours]:
        tasks = {each.name: task_of(each, scenario, method, data=folder / "data", model=model) for each in group}
        say(f"{scenario.name} {method}: {', '.join(each.title for each in group)}")
        pair = _alternate(group, tasks, schedule, folder=folder, cache=cache)
        if ours and (own := pair.pop("ours")):
            for peer in pair.values():
                peer["beside"] = own["rounds"]
            rounds = results.get("ours", {}).get("rounds", []) + own["rounds"]
            results["ours"] = results.get("ours", {}) | own | {"rounds": rounds}
        results |= pair
    return results


def _alternate(
    systems: list[System], tasks: dict[str, dict[str, Any]], schedule: Schedule, *, folder: Path, cache: Path
) -> dict[str, dict[str, Any]]:
    """Load all systems, then let them run the same steps alternately; idle systems wait in a read."""
    results: dict[str, dict[str, Any]] = {system.name: {"title": system.title, "tuned": system.tuned, "rounds": []} for system in systems}
    with ExitStack() as stack:
        running: dict[str, TrainerProcess] = {}
        for system in systems:
            try:
                trainer = TrainerProcess(python_of(system.peer, cache), system.peer, tasks[system.name], folder / system.name)
                stack.callback(trainer.close)
                trainer.wait_until_ready()
                results[system.name]["warmup"] = trainer.run_steps(schedule.warmup)
            except (SystemFailed, NotInstalled) as error:
                results[system.name]["error"] = str(error)
                say(f"  {error}")
                continue
            running[system.name] = trainer
        for number in range(schedule.rounds):
            for name in rotate(list(running), number):
                try:
                    measured = running[name].run_steps(schedule.steps)
                except SystemFailed as error:
                    results[name]["error"] = str(error)
                    del running[name]
                    say(f"  {name}: {error}")
                    continue
                results[name]["rounds"].append(measured)
                tokens = sum(step["tokens"] for step in measured["steps"])
                say(f"  round {number + 1}: {name} {tokens / measured['seconds']:.1f} tokens/s")
        if "ours" in running:
            results["ours"] |= running["ours"].command("peak")
    return results


def rotate(names: list[str], number: int) -> list[str]:
    """Begin with another name in each round, so that no system always follows the same one."""
    first = number % len(names) if names else 0
    return names[first:] + names[:first]
