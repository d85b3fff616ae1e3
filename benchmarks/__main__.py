"""`make bench`, or `python -m benchmarks`: measures llamahome beside its peers, and writes results, tables and pictures.

    make bench                                            everything, about an hour on two cores
    make bench ARGS="--quick"                             a smoke run: one scenario, one round
    make bench ARGS="--level avx2 --scenario docstrings"  every system held to AVX2, in float32
    make bench ARGS="--part speed --scenario docstrings --method lora --systems ours,trl"

A part that is measured again on the same day replaces itself in that day's results file; the others stay.
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
from benchmarks.figures import Shape, compared
from benchmarks.levels import LEVELS, has_fast_bf16, hold_to
from benchmarks.rows import LENGTHS, SCENARIOS, Scenario, scenario
from benchmarks.systems import SYSTEMS, System, chosen, precise, system
from benchmarks.table import page

PARTS = ("speed", "length", "start", "quality")
_LORA_RANK = 16
_STARTED = ("ours", "plain", "trl", "litgpt")
_LENGTH_SYSTEMS = ("ours", "plain")
_LENGTH_ROUNDS = 3
_CTRL_C = 130
"""What a shell makes of it."""


def arguments(words: list[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="of speed, length, start, quality; several apart by commas")
    parser.add_argument("--scenario", choices=[each.name for each in SCENARIOS], help="one instead of all")
    parser.add_argument("--method", choices=("lora", "full"), help="one instead of both")
    parser.add_argument("--systems", help="names apart by commas: ours,plain,trl,trl-padding-free,trl-batch,litgpt,trl-default")
    parser.add_argument("--level", choices=LEVELS, default="native", help="hold every system to this instruction set")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of each round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--rows", type=int, default=96, help="trained on in the quality part")
    parser.add_argument("--held", type=int, default=40, help="held out in the quality part")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the starter, or a folder")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="environments of the peers, rows, logs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="docstrings with LoRA, one round")
    parser.set_defaults(bf16=True)  # found out before anything is measured
    given = parser.parse_args(words)
    for option, known in (("part", PARTS), ("systems", [each.name for each in SYSTEMS])):
        words_given = getattr(given, option)
        if unknown := sorted(set(words_given.split(",") if words_given else ()) - set(known)):
            parser.error(f"--{option}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return given


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


@dataclass(frozen=True)
class Part:
    """Something to measure, and about how long it takes."""

    seconds: float
    peers: Sequence[str]
    """Whose environments it needs."""
    measure: Callable[[], dict[str, Any]]


def parts(given: argparse.Namespace) -> list[Part]:
    """Everything that was asked for, in its order."""
    asked = given.part.split(",") if given.part else PARTS
    found: list[Part] = []
    if "speed" in asked:
        for one in [scenario(given.scenario)] if given.scenario else SCENARIOS:
            for method in [given.method] if given.method else ["lora", "full"]:
                found.append(
                    _side_by_side(given, "speed", one, method, _precise(given, chosen(given.systems, one.name, method)), given.rounds)
                )
    if "length" in asked and not given.scenario and not given.quick:
        both = _precise(given, [system(name) for name in _LENGTH_SYSTEMS])
        found += [_side_by_side(given, "length", one, "lora", both, min(given.rounds, _LENGTH_ROUNDS)) for one in LENGTHS]
    alone = given.part or not given.scenario
    if "start" in asked and alone:
        names, rounds = given.systems.split(",") if given.systems else _STARTED, min(given.rounds, 3)
        wanted = _precise(given, [system(name) for name in names if name in _STARTED])
        starts = functools.partial(start.measure, wanted, rounds=rounds, cache=given.cache, model=given.model)
        found.append(Part(duration.start_s(len(wanted), rounds), [*names, "trl"], lambda: {"start": starts()}))
    if "quality" in asked and alone:
        method = given.method or "lora"
        judge = functools.partial(
            quality.measure, method, rows=given.rows, held=given.held, cache=given.cache, model=given.model, bf16=given.bf16
        )
        found.append(Part(duration.quality_s(given), ["trl"], lambda: {"quality": {method: judge()}}))
    return found


def _precise(given: argparse.Namespace, systems: list[System]) -> list[System]:
    return [precise(each, bf16=given.bf16) for each in systems]


def _side_by_side(given: argparse.Namespace, part: str, one: Scenario, method: str, systems: list[System], rounds: int) -> Part:
    """One scenario of the parts speed or length."""
    name = f"{one.name}-{method}"

    def measure() -> dict[str, Any]:
        told, raw = compare(given, one, method, systems, rounds)
        return {part: {name: told}, "raw": {name: raw}}

    pairs = max(1, sum(each.name != "ours" for each in systems))
    return Part(duration.pairs_s(given, pairs, rounds), [each.peer for each in systems], measure)


def _endings(given: argparse.Namespace) -> str:
    return ("" if given.level == "native" else f"-{given.level}") + ("-quick" if given.quick else "")


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
    hold_to(given.level)
    given.bf16 = has_fast_bf16()
    from llamahome.model.backends.cpu.native import load_kernels
    from llamahome.model.load import find_model

    os.chdir(ROOT)
    given.model = str(find_model(given.model, say=speed.say).resolve())
    command = " ".join(["make bench", *([f'ARGS="{" ".join(words)}"'] if words else [])])
    asked = parts(given)
    if not asked:
        speed.say("nothing to measure: with --scenario or --quick only the part speed is there unless --part names another")
        return 2
    told: dict[str, Any] = {"date": datetime.date.today().isoformat(), "commands": [command], "machine": machine(), "level": given.level}
    path = given.out / f"{told['date']}-{told['machine']['cores']}cores{_endings(given)}.json"
    peers = dict.fromkeys([*(peer for part in asked for peer in part.peers), "pictures"])
    speed.say(duration.told(sum(part.seconds for part in asked), list(peers), given.cache))
    load_kernels()  # compiled before anything is timed; the runs here are shorter than those that would pay for it
    done = 0
    try:
        for part in asked:
            told = results.store(path, {**told, **part.measure()})
            path.with_suffix(".md").write_text(page(told), encoding="utf-8")
            done += 1
        draw(given, path)
    except KeyboardInterrupt:
        speed.say(f"\ninterrupted: {done} of {len(asked)} parts are measured{f' and stand in {path}' if done else ''}")
    if done and given.out == ROOT / "benchmarks/results" and not given.quick:
        pages.main([])
    if done < len(asked):
        return _CTRL_C
    print(page(results.load(path)))
    print(f"written to {path} and beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
