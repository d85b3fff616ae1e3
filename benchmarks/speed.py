"""The speed part: llamahome and one peer after the other, both loaded, doing the same steps in turns."""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.client import SystemFailed, Trainer, environment
from benchmarks.environments import NotInstalled, python_of
from benchmarks.rows import Scenario
from benchmarks.systems import System

RATES = {"lora": 1.3e-3, "full": 1.3e-4}
"""llamahome's own rates for the starter; all systems use them."""


@dataclass(frozen=True)
class Length:
    """How long it is measured."""

    warmup: int = 2
    """Steps before the first round: compilation and first touches of memory are told apart in the start part."""
    rounds: int = 5
    steps: int = 1
    """Of each round."""

    @property
    def all_steps(self) -> int:
        """Steps that each system does."""
        return self.warmup + self.rounds * self.steps


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def make_rows(scenario: Scenario, folder: Path, *, rows: int, model: str, skip: int = 0) -> dict[str, Any]:
    """Let another process write the rows, so that this one never loads torch; what it tells of them."""
    folder.mkdir(parents=True, exist_ok=True)
    task = {"folder": str(folder), "rows": rows, "length": scenario.length, "max_length": scenario.max_length, "model": model, "skip": skip}
    (folder / "rows-task.json").write_text(json.dumps(task), encoding="utf-8")
    words = [sys.executable, "-m", "benchmarks.rows", str(folder / "rows-task.json")]
    done = subprocess.run(words, env=environment(), cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def task_of(system: System, scenario: Scenario, method: str, *, data: Path, model: str, batch: int | None = None) -> dict[str, Any]:
    """What the process of a system is told."""
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
    systems: list[System], scenario: Scenario, method: str, length: Length, *, cache: Path, model: str
) -> dict[str, dict[str, Any]]:
    """For each system its rounds, or why it has none.

    Each peer takes turns with llamahome alone: four trainers in memory at once slow each other down. `beside` are llamahome's rounds of
    that pair; its own rounds are those of all pairs.
    """
    folder = cache / "work" / f"{scenario.name}-{method}"
    make_rows(scenario, folder / "data", rows=length.all_steps * scenario.batch, model=model)
    ours = [each for each in systems if each.name == "ours"]
    peers = [each for each in systems if each.name != "ours"]
    found: dict[str, dict[str, Any]] = {}
    for company in [[*ours, peer] for peer in peers] or [ours]:
        tasks = {each.name: task_of(each, scenario, method, data=folder / "data", model=model) for each in company}
        say(f"{scenario.name} {method}: {', '.join(each.title for each in company)}")
        pair = _in_turns(company, tasks, length, folder=folder, cache=cache)
        if ours and (own := pair.pop("ours")):
            for peer in pair.values():
                peer["beside"] = own["rounds"]
            rounds = found.get("ours", {}).get("rounds", []) + own["rounds"]
            found["ours"] = found.get("ours", {}) | own | {"rounds": rounds}
        found |= pair
    return found


def _in_turns(
    systems: list[System], tasks: dict[str, dict[str, Any]], length: Length, *, folder: Path, cache: Path
) -> dict[str, dict[str, Any]]:
    """All are loaded, then do the same steps in turns; idle ones wait in a read."""
    found: dict[str, dict[str, Any]] = {system.name: {"title": system.title, "tuned": system.tuned, "rounds": []} for system in systems}
    with ExitStack() as stack:
        running: dict[str, Trainer] = {}
        for system in systems:
            try:
                trainer = Trainer(python_of(system.peer, cache), system.peer, tasks[system.name], folder / system.name)
                stack.callback(trainer.close)
                trainer.wait_until_ready()
                found[system.name]["warmup"] = trainer.go(length.warmup)
            except (SystemFailed, NotInstalled) as error:
                found[system.name]["error"] = str(error)
                say(f"  {error}")
                continue
            running[system.name] = trainer
        for number in range(length.rounds):
            for name in rotated(list(running), number):
                try:
                    told = running[name].go(length.steps)
                except SystemFailed as error:
                    found[name]["error"] = str(error)
                    del running[name]
                    say(f"  {name}: {error}")
                    continue
                found[name]["rounds"].append(told)
                tokens = sum(step["tokens"] for step in told["steps"])
                say(f"  round {number + 1}: {name} {tokens / told['seconds']:.1f} tokens/s")
        if "ours" in running:
            found["ours"] |= running["ours"].command("peak")
    return found


def rotated(names: list[str], number: int) -> list[str]:
    """The names from another one on in each round, so that none always follows the same."""
    cut = number % len(names) if names else 0
    return names[cut:] + names[:cut]
