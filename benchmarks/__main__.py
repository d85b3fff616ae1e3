"""`make bench`, or `python -m benchmarks`: measures llamahome beside its peers, and writes results, tables and pictures.

make bench                                            everything, about three quarters of an hour on two cores
make bench ARGS="--quick"                             a smoke run: one scenario, one round
make bench ARGS="--scenario docstrings --method lora --systems ours,trl"
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks import speed
from benchmarks.client import ROOT
from benchmarks.figures import Shape, compared
from benchmarks.rows import SCENARIOS, scenario
from benchmarks.systems import chosen
from benchmarks.table import page

_LORA_RANK = 16


def arguments(words: list[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=[each.name for each in SCENARIOS], help="one instead of all")
    parser.add_argument("--method", choices=("lora", "full"), help="one instead of both")
    parser.add_argument("--systems", help="names apart by commas: ours,plain,trl,trl-padding-free,trl-batch,litgpt,trl-default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of each round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
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


def speeds(given: argparse.Namespace, model: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The speed part of every scenario and method asked for; measurements go into `raw`."""
    told = {}
    length = speed.Length(warmup=given.warmup, rounds=given.rounds, steps=given.steps)
    shape = Shape.of(json.loads((Path(model) / "config.json").read_text(encoding="utf-8")))
    for one in [scenario(given.scenario)] if given.scenario else SCENARIOS:
        for method in [given.method] if given.method else ("lora", "full"):
            name = f"{one.name}-{method}"
            systems = chosen(given.systems, one.name)
            raw[name] = speed.measure(systems, one, method, length, cache=given.cache, model=model)
            words = f"{one.batch} rows a step, {length.rounds} rounds of {length.steps} after {length.warmup} steps, in turns"
            title = f"{'LoRA' if method == 'lora' else 'Full fine-tuning'}, {one.title}"
            rank = _LORA_RANK if method == "lora" else None
            told[name] = {"title": title, "words": words, **compared(raw[name], shape=shape, rank=rank)}
    return told


def main(words: list[str]) -> int:
    """Measure and write; returns the exit status."""
    given = arguments(words)
    given.cache, given.out = given.cache.resolve(), given.out.resolve()
    if given.quick:
        given.scenario, given.method, given.rounds, given.warmup = given.scenario or "docstrings", given.method or "lora", 1, 1
    from llamahome.model.load import find_model

    os.chdir(ROOT)
    model = str(find_model(given.model, say=speed.say).resolve())
    raw: dict[str, Any] = {}
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["make bench", *([f'ARGS="{" ".join(words)}"'] if words else [])]),
        "machine": machine(),
        "speed": speeds(given, model, raw),
        "raw": raw,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    name = f"{results['date']}-{results['machine']['cores']}cores{'-quick' if given.quick else ''}"
    (given.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (given.out / f"{name}.md").write_text(page(results), encoding="utf-8")
    print(page(results))
    print(f"written to {given.out / name}.json and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
