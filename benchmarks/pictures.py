"""Draws the charts of a results file as PNG and SVG: speed per system, seconds per part of a step, cost by length.

    python -m benchmarks.pictures benchmarks/results/2026-11-22-2cores.json

needs matplotlib (the extra `plots`); `make bench` creates an environment for it. Prints the names of the files.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import PARTS

_OURS, _OTHERS, _SLOW = "#b5482a", "#4c6a87", "#a9b7c4"


def speed_bars(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """The title of each scenario, and title, tokens per second and colour of its systems, fastest first."""
    scenarios = []
    for part in results["speed"].values():
        bars = [
            (each["title"], each["tokens_per_s"]["median"], _OURS if name == "ours" else _OTHERS if each["tuned"] else _SLOW)
            for name, each in part["systems"].items()
            if "error" not in each
        ]
        if bars:
            scenarios.append((part["title"], sorted(bars, key=lambda bar: -bar[1])))
    return scenarios


def cost_lines(results: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(length, milliseconds per token) of each system for LoRA on rows of one length, shortest first; none unless lengths were measured."""
    if not results["length"]:
        return {}
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, part in {**results["speed"], **results["length"]}.items():
        match = re.fullmatch(r"rows-(\d+)-lora", name)
        for each in part["systems"].values() if match else ():
            if "error" not in each and each["tuned"]:
                lines.setdefault(each["title"], []).append((int(match[1]), 1000 / each["tokens_per_s"]["median"]))
    return {title: sorted(points) for title, points in lines.items() if len(points) > 1}


def part_shares(results: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part of a step; empty if they were not measured."""
    seconds: dict[str, float] = results.get("start", {}).get("checkpoint", {}).get("parts", {})
    return {name: seconds[name] for name in PARTS if seconds.get(name, 0.0) > 0}


def draw(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write the charts to files that begin with `stem`, and return the files. A chart without data is left out."""
    from matplotlib.figure import Figure

    figures: dict[str, Figure] = {}
    if bars := speed_bars(results):
        figures["speed"] = _bars(Figure, bars)
    if parts := part_shares(results):
        figures["parts"] = _parts(Figure, parts)
    if lines := cost_lines(results):
        figures["length"] = _lines(Figure, lines)
    written = []
    for name, figure in figures.items():
        for ending in ("png", "svg"):
            path = stem.with_name(f"{stem.name}-{name}.{ending}")
            figure.savefig(path, metadata={"Date": None} if ending == "svg" else None)
            written.append(path)
    return written


def _bars(make: Any, scenarios: list[tuple[str, list[tuple[str, float, str]]]]) -> Any:
    sizes = [len(bars) + 1.2 for _, bars in scenarios]
    figure = make(figsize=(9, 0.32 * sum(sizes) + 0.6), dpi=120, layout="constrained")
    all_axes = figure.subplots(len(scenarios), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for axes, (title, bars) in zip(all_axes, scenarios, strict=True):
        names, rates, colours = zip(*bars, strict=True)
        drawn = axes.barh(range(len(bars)), rates, color=colours)
        axes.bar_label(drawn, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axes.set_yticks(range(len(bars)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9, loc="left")
        axes.margins(x=0.1)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlabel("real tokens a second", fontsize=8)
    return figure


def _parts(make: Any, parts: Mapping[str, float]) -> Any:
    figure = make(figsize=(9, 2.2), dpi=120, layout="constrained")
    axes, begin, total = figure.subplots(), 0.0, sum(parts.values())
    for (name, seconds), shade in zip(parts.items(), ("#d9c7a0", _OTHERS, _OURS, "#7a9a6b", _SLOW), strict=False):
        axes.barh([0], [seconds], left=begin, color=shade, label=f"{name} {seconds / total:.1%}")
        begin += seconds
    axes.set_yticks([])
    axes.set_xlabel("seconds of a step", fontsize=8)
    axes.set_title("llamahome, LoRA, docstrings: time per part of a step", fontsize=9, loc="left")
    figure.legend(ncols=len(parts), fontsize=8, loc="outside lower center", frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _lines(make: Any, lines: Mapping[str, list[tuple[int, float]]]) -> Any:
    figure = make(figsize=(9, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for title, points in lines.items():
        ours = title == "llamahome"
        axes.plot(*zip(*points, strict=True), marker="o", label=title, color=_OURS if ours else None, linewidth=2.5 if ours else 1.2)
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of each row")
    axes.set_ylabel("milliseconds a token")
    axes.set_title("LoRA: cost against length", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    source = Path(sys.argv[1])
    for file in draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix("")):
        print(file)
