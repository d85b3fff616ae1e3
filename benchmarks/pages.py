"""Fills the figures of README.md and docs/Performance.md from the newest results file, so that nobody types them.

    python -m benchmarks.pages            writes them
    python -m benchmarks.pages --check    exit status 1 when a page says something else

In a page they stand between `<!-- bench:NAME -->` and `<!-- /bench -->`.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.client import ROOT
from benchmarks.levels import LEVELS
from benchmarks.results import newest
from benchmarks.table import markdown, quality_line, speed_table, speed_words, start_lines

PAGES = ("README.md", "docs/Performance.md")
_BLOCK = re.compile(r"(<!-- bench:([a-z]+)(?:-(avx2|avx512))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
_NOTHING = "No results are kept here yet: `make bench` writes them.\n"


def ratios(results: Mapping[str, Any]) -> str:
    """The short table of the README: how many times as fast, and with how much of the memory."""
    rows = []
    for part in results["speed"].values():
        systems, best = part["systems"], part["best_peer"]
        for name, label in ((best, None), ("plain", "a plain PyTorch loop"), ("trl-default", "TRL with its default batching")):
            each = systems.get(name)
            if each is None or "times_as_fast" not in each:
                continue
            title = label or each["title"]
            rows.append([part["title"], title, f"{each['times_as_fast']['median']:.1f}x", f"{each['memory_ratio']:.2f}x"])
    machine = results["machine"]
    held = f", held to {results['level']}" if results.get("level", "native") != "native" else ""
    said = f"`make bench` on {machine['cores']} cores ({machine['processor']}{held}, no GPU), {results['date']}; the same rows for all:"
    return f"{said}\n\n{markdown(['work', 'against', 'speed', 'peak memory'], rows)}\n"


def speeds(results: Mapping[str, Any]) -> str:
    """Every scenario with all systems."""
    told = []
    for part in [*results["speed"].values(), *results["length"].values()]:
        told += [f"### {part['title']}", "", f"{part['words'].capitalize()}.", "", speed_table(part), "", " ".join(speed_words(part)), ""]
    return "\n".join(told)


def start(results: Mapping[str, Any]) -> str:
    """From the start of the process."""
    return "\n".join(start_lines(results["start"])) + "\n" if "start" in results else _NOTHING


def quality(results: Mapping[str, Any]) -> str:
    """Held-out loss."""
    return "".join(f"- {quality_line(part)}\n" for part in results["quality"].values()) or _NOTHING


def peak(results: Mapping[str, Any]) -> str:
    """Shares of the machine's own matrix products."""
    found = [
        [part["title"], f"{part['systems']['ours']['share_of_peak']['median']:.0%}"]
        for part in results["speed"].values()
        if "share_of_peak" in part["systems"].get("ours", {})
    ]
    return markdown(["work", "share of the product peak"], found) + "\n"


def parts(results: Mapping[str, Any]) -> str:
    """Seconds of each part of a step."""
    found = results.get("start", {}).get("checkpoint", {}).get("parts", {})
    whole = sum(found.values())
    rows = [[name, f"{seconds:.3f}", f"{seconds / whole:.1%}"] for name, seconds in found.items()]
    return markdown(["part", "seconds", "share"], rows) + "\n" if rows else _NOTHING


def pictures(results: Mapping[str, Any], folder: Path, stem: str) -> str:
    """Links to the pictures that lie beside the results file."""
    shown = {"speed": "tokens a second per system", "parts": "time per part of a step", "length": "cost against length"}
    found = [(name, words) for name, words in shown.items() if (folder / f"{stem}-{name}.png").is_file()]
    return "\n".join(f"![{words}](../benchmarks/results/{stem}-{name}.png)" for name, words in found) + "\n" if found else _NOTHING


def machine(results: Mapping[str, Any]) -> str:
    """What it was measured on and with."""
    told = results["machine"]
    words = f"{results['date']}: {told['processor']}, {told['cores']} cores, {told['memory_gb']:.0f} GB, no GPU; torch {told['torch']}"
    load = f"load when it began {told['load']:.1f}"
    commands = ", ".join(f"`{one}`" for one in results["commands"])
    middle = [each["systems"]["ours"].get("peak_gflops") for each in results["speed"].values() if "ours" in each["systems"]]
    rates = [rate for rate in middle if rate]
    peak_words = f"; a large matrix product reaches {statistics.median(rates):,.0f} GFLOP/s" if rates else ""
    return f"{words}{peak_words}; {load}. {commands}\n"


def block(name: str, results: Mapping[str, Any] | None, path: Path | None) -> str:
    """The text of one block; a KeyError names a block that there is not."""
    if results is None or path is None:
        return _NOTHING
    if name == "pictures":
        return pictures(results, path.parent, path.stem)
    made = {"ratios": ratios, "speeds": speeds, "start": start, "quality": quality, "peak": peak, "parts": parts, "machine": machine}
    return made[name](results)


def filled(text: str, paths: Mapping[str, Path | None]) -> str:
    """The page with every block as the results file of its level has it."""
    told = {level: json.loads(path.read_text(encoding="utf-8")) if path else None for level, path in paths.items()}

    def fill(found: re.Match[str]) -> str:
        level = found[3] or "native"
        return found[1] + block(found[2], told[level], paths[level]) + found[4]

    return _BLOCK.sub(fill, text)


def paths_of(folder: Path) -> dict[str, Path | None]:
    """The newest results file of each level."""
    return {level: newest(folder, level) for level in LEVELS}


def main(words: list[str]) -> int:
    """Fill or check the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(words)
    paths = paths_of(ROOT / "benchmarks/results")
    other = []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        wanted = filled(text, paths)
        if wanted != text:
            other.append(name)
            if not given.check:
                page.write_text(wanted, encoding="utf-8")
    for name in other:
        print(f"{name}: {'differs from' if given.check else 'filled from'} the newest results")
    return 1 if given.check and other else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
