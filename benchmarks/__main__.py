"""`make bench`, or `python -m benchmarks`: compares llamahome with its peers, and writes results, tables and charts.

    make bench                                            everything, about an hour on two cores
    make bench ARGS="--quick"                             a smoke run: one scenario, one round
    make bench ARGS="--level avx2 --scenario docstrings"  every system limited to AVX2, in float32
    make bench ARGS="--part speed --scenario docstrings --method lora --systems ours,trl"

A part that is repeated on the same day replaces its earlier result in the results file of that day.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import duration, pages, quality, results, speed, start
from benchmarks.client import ROOT, environment
from benchmarks.environments import NotInstalled, python_of
from benchmarks.figures import Shape
from benchmarks.figures import compare as compare_systems
from benchmarks.levels import LEVELS, has_fast_bf16, limit_to
from benchmarks.rows import LENGTHS, SCENARIOS, Scenario, scenario
from benchmarks.systems import SYSTEMS, System, select_systems, system, with_precision
from benchmarks.table import page

PARTS = ("speed", "length", "start", "quality")
_LORA_RANK = 16
_START_SYSTEMS = ("ours", "plain", "trl", "litgpt")
_LENGTH_SYSTEMS = ("ours", "plain")
_LENGTH_ROUNDS = 3
_INTERRUPTED = 130
"""The exit status that a shell reports for Ctrl-C."""


def arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="speed, length, start or quality; several separated by commas")
    parser.add_argument("--scenario", choices=[each.name for each in SCENARIOS], help="one scenario instead of all")
    parser.add_argument("--method", choices=("lora", "full"), help="one method instead of both")
    parser.add_argument("--systems", help="names separated by commas: ours,plain,trl,trl-padding-free,trl-batch,litgpt,trl-default")
    parser.add_argument("--level", choices=LEVELS, default="native", help="limit every system to this instruction set")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--rows", type=int, default=96, help="rows to train on in the quality part")
    parser.add_argument("--held", type=int, default=40, help="held-out rows in the quality part")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the starter, or a folder")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="environments of the peers, rows, logs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="docstrings with LoRA, one round")
    parser.set_defaults(bf16=True)  # main measures it
    options = parser.parse_args(words)
    for option, known in (("part", PARTS), ("systems", [each.name for each in SYSTEMS])):
        value = getattr(options, option)
        if unknown := sorted(set(value.split(",") if value else ()) - set(known)):
            parser.error(f"--{option}: unknown {', '.join(unknown)}; the choices are {', '.join(known)}")
    return options


def machine() -> dict[str, Any]:
    """Describe the machine."""
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
    options: argparse.Namespace, one: Scenario, method: str, systems: list[System], rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure one scenario; return the comparison and the raw measurements."""
    schedule = speed.Schedule(warmup=options.warmup, rounds=rounds, steps=options.steps)
    raw = speed.measure(systems, one, method, schedule, cache=options.cache, model=options.model)
    shape = Shape.of(json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8")))
    words = f"{one.batch} rows a step, {schedule.rounds} rounds of {schedule.steps} after {schedule.warmup} steps, in turns"
    title = f"{'LoRA' if method == 'lora' else 'Full fine-tuning'}, {one.title}"
    comparison = compare_systems(raw, shape=shape, rank=_LORA_RANK if method == "lora" else None)
    return {"title": title, "words": words, **comparison}, raw


@dataclass(frozen=True)
class Part:
    """Something to measure, with its estimated duration."""

    seconds: float
    peers: Sequence[str]
    """The peers whose environments it needs."""
    measure: Callable[[], dict[str, Any]]


def parts(options: argparse.Namespace) -> list[Part]:
    """Return the requested parts in order."""
    requested = options.part.split(",") if options.part else PARTS
    selected: list[Part] = []
    if "speed" in requested:
        for one in [scenario(options.scenario)] if options.scenario else SCENARIOS:
            for method in [options.method] if options.method else ["lora", "full"]:
                selected.append(
                    _comparison(
                        options,
                        "speed",
                        one,
                        method,
                        _with_precision(options, select_systems(options.systems, one.name, method)),
                        options.rounds,
                    )
                )
    if "length" in requested and not options.scenario and not options.quick:
        pair = _with_precision(options, [system(name) for name in _LENGTH_SYSTEMS])
        selected += [_comparison(options, "length", one, "lora", pair, min(options.rounds, _LENGTH_ROUNDS)) for one in LENGTHS]
    whole_parts = options.part or not options.scenario
    if "start" in requested and whole_parts:
        names, rounds = options.systems.split(",") if options.systems else _START_SYSTEMS, min(options.rounds, 3)
        starters = _with_precision(options, [system(name) for name in names if name in _START_SYSTEMS])
        starts = functools.partial(start.measure, starters, rounds=rounds, cache=options.cache, model=options.model)
        selected.append(Part(duration.start_s(len(starters), rounds), [*names, "trl"], lambda: {"start": starts()}))
    if "quality" in requested and whole_parts:
        method = options.method or "lora"
        run_quality = functools.partial(
            quality.measure, method, rows=options.rows, held=options.held, cache=options.cache, model=options.model, bf16=options.bf16
        )
        selected.append(Part(duration.quality_s(options), ["trl"], lambda: {"quality": {method: run_quality()}}))
    return selected


def _with_precision(options: argparse.Namespace, systems: list[System]) -> list[System]:
    return [with_precision(each, bf16=options.bf16) for each in systems]


def _comparison(options: argparse.Namespace, part: str, one: Scenario, method: str, systems: list[System], rounds: int) -> Part:
    """One scenario of the part speed or length."""
    name = f"{one.name}-{method}"

    def measure() -> dict[str, Any]:
        comparison, raw = compare(options, one, method, systems, rounds)
        return {part: {name: comparison}, "raw": {name: raw}}

    pairs = max(1, sum(each.name != "ours" for each in systems))
    return Part(duration.pairs_s(options, pairs, rounds), [each.peer for each in systems], measure)


def _suffix(options: argparse.Namespace) -> str:
    return ("" if options.level == "native" else f"-{options.level}") + ("-quick" if options.quick else "")


def draw(options: argparse.Namespace, path: Path) -> None:
    """Draw the charts in an environment with matplotlib; without one, only the charts are missing."""
    try:
        python = python_of("pictures", options.cache)
    except NotInstalled as error:
        speed.say(f"no charts: matplotlib {error}")
        return
    subprocess.run([python, "-m", "benchmarks.pictures", str(path)], cwd=ROOT, env=environment(), stdout=sys.stderr, check=False)


def main(words: list[str]) -> int:
    """Measure and write the results; return the exit status."""
    options = arguments(words)
    options.cache, options.out = options.cache.resolve(), options.out.resolve()
    if options.quick:
        options.rounds, options.warmup, options.rows, options.held = 1, 1, 8, 4
        options.part, options.scenario, options.method = options.part or "speed", options.scenario or "docstrings", options.method or "lora"
    limit_to(options.level)
    options.bf16 = has_fast_bf16()
    from llamahome.model.backends.cpu.native import load_kernels
    from llamahome.model.load import find_model

    os.chdir(ROOT)
    options.model = str(find_model(options.model, say=speed.say).resolve())
    command = " ".join(["make bench", *([f'ARGS="{" ".join(words)}"'] if words else [])])
    requested = parts(options)
    if not requested:
        speed.say("nothing to measure: --scenario and --quick only select the part speed, unless --part names another")
        return 2
    content: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commands": [command],
        "machine": machine(),
        "level": options.level,
    }
    path = options.out / f"{content['date']}-{content['machine']['cores']}cores{_suffix(options)}.json"
    peers = dict.fromkeys([*(peer for part in requested for peer in part.peers), "pictures"])
    speed.say(duration.message(sum(part.seconds for part in requested), list(peers), options.cache))
    load_kernels()  # compile before anything is timed, because these runs are too short to amortize it
    done = 0
    try:
        for part in requested:
            content = results.store(path, {**content, **part.measure()})
            path.with_suffix(".md").write_text(page(content), encoding="utf-8")
            done += 1
        draw(options, path)
    except KeyboardInterrupt:
        speed.say(f"\ninterrupted: {done} of {len(requested)} parts are measured{f' and written to {path}' if done else ''}")
    if done and options.out == ROOT / "benchmarks/results" and not options.quick:
        pages.main([])
    if done < len(requested):
        return _INTERRUPTED
    print(page(results.load(path)))
    print(f"written to {path}, with a table and charts")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
