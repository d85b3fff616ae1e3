"""`make bench`, or `python -m benchmarks`: measures llamahome beside its peers, and writes results, tables and pictures.

    make bench                                            everything, about an hour on two cores
    make bench ARGS="--quick"                             a smoke run: one scenario, one round
    make bench ARGS="--part speed --scenario docstrings --method lora --systems ours,trl"

A part that is measured again on the same day replaces itself in that day's results file; the others stay.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import pages, quality, results, speed, start
from benchmarks.client import ROOT, environment
from benchmarks.environments import NotInstalled, python_of
from benchmarks.figures import Shape, compared
from benchmarks.rows import LENGTHS, SCENARIOS, Scenario, scenario
from benchmarks.systems import System, chosen, system
from benchmarks.table import page

PARTS = ("speed", "length", "start", "quality")
_LORA_RANK = 16
_STARTED = ("ours", "plain", "trl", "litgpt")
_LENGTH_SYSTEMS = ("ours", "plain")
_LENGTH_ROUNDS = 3


def arguments(words: list[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="of speed, length, start, quality; several apart by commas")
    parser.add_argument("--scenario", choices=[each.name for each in SCENARIOS], help="one instead of all")
    parser.add_argument("--method", choices=("lora", "full"), help="one instead of both")
    parser.add_argument("--systems", help="names apart by commas: ours,plain,trl,trl-padding-free,trl-batch,litgpt,trl-default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of each round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--rows", type=int, default=96, help="trained on in the quality part")
    parser.add_argument("--held", type=int, default=40, help="held out in the quality part")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the starter, or a folder")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="environments of the peers, rows, logs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="docstrings with LoRA, one round")
    return parser.parse_args(words)


def machine() -> dict[str, Any]:
    """On what it was measured."""
    from llamahome.distributed.processors import usable_cpus

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": usable_cpus(),
        "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def compare(
    given: argparse.Namespace, one: Scenario, method: str, systems: list[System], rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said of one scenario, and what was measured."""
    length = speed.Length(warmup=given.warmup, rounds=rounds, steps=given.steps)
    raw = speed.measure(systems, one, method, length, cache=given.cache, model=given.model)
    shape = Shape.of(json.loads((Path(given.model) / "config.json").read_text(encoding="utf-8")))
    words = f"{one.batch} rows a step, {length.rounds} rounds of {length.steps} after {length.warmup} steps, in turns"
    title = f"{'LoRA' if method == 'lora' else 'Full fine-tuning'}, {one.title}"
    told = compared(raw, shape=shape, rank=_LORA_RANK if method == "lora" else None)
    return {"title": title, "words": words, **told}, raw


def parts(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each part that was asked for as soon as it is measured."""
    asked = given.part.split(",") if given.part else PARTS
    methods = [given.method] if given.method else ["lora", "full"]
    if "speed" in asked:
        for one in [scenario(given.scenario)] if given.scenario else SCENARIOS:
            for method in methods:
                told, raw = compare(given, one, method, chosen(given.systems, one.name, method), given.rounds)
                yield {"speed": {f"{one.name}-{method}": told}, "raw": {f"{one.name}-{method}": raw}}
    if "length" in asked and not given.scenario and not given.quick:
        for one in LENGTHS:
            told, raw = compare(given, one, "lora", [system(name) for name in _LENGTH_SYSTEMS], min(given.rounds, _LENGTH_ROUNDS))
            yield {"length": {f"{one.name}-lora": told}, "raw": {f"{one.name}-lora": raw}}
    if "start" in asked and (given.part or not given.scenario):
        names = given.systems.split(",") if given.systems else _STARTED
        wanted = [system(name) for name in names if name in _STARTED]
        yield {"start": start.measure(wanted, rounds=min(given.rounds, 3), cache=given.cache, model=given.model)}
    if "quality" in asked and (given.part or not given.scenario):
        method = given.method or "lora"
        yield {"quality": {method: quality.measure(method, rows=given.rows, held=given.held, cache=given.cache, model=given.model)}}


def draw(given: argparse.Namespace, path: Path) -> None:
    """The pictures, by an environment with matplotlib; without one the results are whole all the same."""
    try:
        python = python_of("pictures", given.cache)
    except NotInstalled as error:
        speed.say(f"no pictures: matplotlib {error}")
        return
    subprocess.run([python, "-m", "benchmarks.pictures", str(path)], cwd=ROOT, env=environment(), stdout=sys.stderr, check=False)


def main(words: list[str]) -> int:
    """Measure and write; returns the exit status."""
    given = arguments(words)
    given.cache, given.out = given.cache.resolve(), given.out.resolve()
    if given.quick:
        given.rounds, given.warmup, given.rows, given.held = 1, 1, 8, 4
        given.part, given.scenario, given.method = given.part or "speed", given.scenario or "docstrings", given.method or "lora"
    from llamahome.model.load import find_model

    os.chdir(ROOT)
    given.model = str(find_model(given.model, say=speed.say).resolve())
    command = " ".join(["make bench", *([f'ARGS="{" ".join(words)}"'] if words else [])])
    told: dict[str, Any] = {"date": datetime.date.today().isoformat(), "commands": [command], "machine": machine()}
    path = given.out / f"{told['date']}-{told['machine']['cores']}cores{'-quick' if given.quick else ''}.json"
    for part in parts(given):
        told = results.store(path, {**told, **part})
        path.with_suffix(".md").write_text(page(told), encoding="utf-8")
    draw(given, path)
    if given.out == ROOT / "benchmarks/results" and not given.quick:
        pages.main([])
    print(page(results.load(path)))
    print(f"written to {path} and beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
