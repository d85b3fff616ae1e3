"""Writes the results into README.md and docs/Performance.md: of each scenario the newest, with its date.

    python -m benchmarks.pages            writes the pages
    python -m benchmarks.pages --check    exit status 1 if a page differs from the results

In a page, each block is between `<!-- bench:NAME -->` and `<!-- /bench -->`.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.client import ROOT
from benchmarks.levels import LEVELS
from benchmarks.results import files, gathered
from benchmarks.table import markdown, quality_line, speed_notes, speed_table, start_lines

PAGES = ("README.md", "docs/Performance.md")
_BLOCK = re.compile(r"(<!-- bench:([a-z]+)(?:-(avx2|avx512))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
_NOTHING = "No results are kept here yet: `make bench` writes them.\n"


def ratios(results: Mapping[str, Any]) -> str:
    """The short table of the README: speed and peak memory relative to the peers."""
    rows = []
    for part in results["speed"].values():
        systems, best = part["systems"], part["best_peer"]
        for name, label in ((best, None), ("plain", "a plain PyTorch loop"), ("trl-default", "TRL with its default batching")):
            each = systems.get(name)
            if each is None or "times_as_fast" not in each:
                continue
            title = label or each["title"]
            figures = [f"{each['times_as_fast']['median']:.1f}x", f"{each['memory_ratio']:.2f}x"]
            rows.append([part["title"], title, *figures, part.get("date", results["date"])])
    machine = results["machine"]
    level = f", held to {results['level']}" if results.get("level", "native") != "native" else ""
    intro = f"`make bench` on {machine['cores']} cores ({machine['processor']}{level}, no GPU); the same rows for all:"
    return f"{intro}\n\n{markdown(['work', 'against', 'speed', 'peak memory', 'measured'], rows)}\n"


def speeds(results: Mapping[str, Any]) -> str:
    """The table of every scenario."""
    lines = []
    for part in [*results["speed"].values(), *results["length"].values()]:
        lines += [
            f"### {part['title']}",
            "",
            f"{part['words'].capitalize()}; {part.get('date', results['date'])}.",
            "",
            speed_table(part),
            "",
            " ".join(speed_notes(part)),
            "",
        ]
    return "\n".join(lines)


def start(results: Mapping[str, Any]) -> str:
    """The results of the start part."""
    return "\n".join(start_lines(results["start"])) + "\n" if "start" in results else _NOTHING


def quality(results: Mapping[str, Any]) -> str:
    """The held-out losses."""
    return "".join(f"- {quality_line(part)}\n" for part in results["quality"].values()) or _NOTHING


def peak(results: Mapping[str, Any]) -> str:
    """The share of the machine's matrix product rate that each scenario reaches."""
    rows = [
        [part["title"], f"{part['systems']['ours']['share_of_peak']['median']:.0%}"]
        for part in results["speed"].values()
        if "share_of_peak" in part["systems"].get("ours", {})
    ]
    return markdown(["work", "share of the product peak"], rows) + "\n"


def parts(results: Mapping[str, Any]) -> str:
    """The seconds of each part of a step."""
    seconds_by_part = results.get("start", {}).get("checkpoint", {}).get("parts", {})
    total = sum(seconds_by_part.values())
    rows = [[name, f"{seconds:.3f}", f"{seconds / total:.1%}"] for name, seconds in seconds_by_part.items()]
    return markdown(["part", "seconds", "share"], rows) + "\n" if rows else _NOTHING


def pictures(paths: Sequence[Path]) -> str:
    """Links to the newest chart of each kind in the folder of the results files."""
    titles = {"speed": "tokens a second per system", "parts": "time per part of a step", "length": "cost against length"}
    charts = {name: [found for path in paths if (found := path.with_name(f"{path.stem}-{name}.png")).is_file()] for name in titles}
    return "".join(f"![{titles[name]}](../benchmarks/results/{each[-1].name})\n" for name, each in charts.items() if each) or _NOTHING


def machine(results: Mapping[str, Any]) -> str:
    """The machine, its peak rate, and the commands, for each day."""
    return "".join(_day(each) for each in results.get("days", [results]))


def _day(results: Mapping[str, Any]) -> str:
    info = results["machine"]
    text = f"{results['date']}: {info['processor']}, {info['cores']} cores, {info['memory_gb']:.0f} GB, no GPU; torch {info['torch']}"
    load = f"load when it began {info['load']:.1f}"
    commands = ", ".join(f"`{one}`" for one in results["commands"])
    rates = [each["systems"]["ours"].get("peak_gflops") for each in results["speed"].values() if "ours" in each["systems"]]
    rates = [rate for rate in rates if rate]
    peak_text = f"; a large matrix product reaches {statistics.median(rates):,.0f} GFLOP/s" if rates else ""
    return f"- {text}{peak_text}; {load}. {commands}\n"


def block(name: str, results: Mapping[str, Any], paths: Sequence[Path]) -> str:
    """Return the text of one block. Raises KeyError for an unknown name."""
    if not results:
        return _NOTHING
    if name == "pictures":
        return pictures(paths)
    writers = {"ratios": ratios, "speeds": speeds, "start": start, "quality": quality, "peak": peak, "parts": parts, "machine": machine}
    return writers[name](results)


def fill_page(text: str, paths: Mapping[str, Sequence[Path]]) -> str:
    """Return the page with every block replaced from the results files of its level."""
    results = {level: gathered(of_level) for level, of_level in paths.items()}

    def fill(match: re.Match[str]) -> str:
        level = match[3] or "native"
        return match[1] + block(match[2], results[level], paths[level]) + match[4]

    return _BLOCK.sub(fill, text)


def paths_of(folder: Path) -> dict[str, list[Path]]:
    """Return the results files of each level, the oldest first."""
    return {level: files(folder, level) for level in LEVELS}


def main(words: list[str]) -> int:
    """Write or check the pages; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(words)
    paths = paths_of(ROOT / "benchmarks/results")
    changed = []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        current = fill_page(text, paths)
        if current != text:
            changed.append(name)
            if not options.check:
                page.write_text(current, encoding="utf-8")
    for name in changed:
        print(f"{name}: {'differs from' if options.check else 'filled from'} the results")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
