"""Results as Markdown. Pure: a results file gives the same text everywhere."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ranged(value: Mapping[str, float], digits: int = 0) -> str:
    """`750 (741 to 760)`."""
    return f"{value['median']:,.{digits}f} ({value['low']:,.{digits}f} to {value['high']:,.{digits}f})"


def speed_table(part: Mapping[str, Any]) -> str:
    """One scenario: a row per system."""
    rows = []
    for name, each in part["systems"].items():
        if "error" in each:
            rows.append([each["title"], "-", "-", "-", "-", each["error"].replace("|", "/")])
            continue
        times = _ranged(each["times_as_fast"], 2) if "times_as_fast" in each else "1" if name == "ours" else "-"
        speeds = [_ranged(each["tokens_per_s"]), _ranged(each["targets_per_s"])]
        rows.append([each["title"], *speeds, f"{each['peak_bytes'] / 1e9:.1f}", times, f"`{each['hash']}`"])
    head = ["system", "tokens/s", "targets/s", "peak GB", "ours is faster by", "hash of ids and targets"]
    return markdown(head, rows)


def speed_words(part: Mapping[str, Any]) -> list[str]:
    """What is to be said below the table."""
    told = []
    ours = part["systems"].get("ours", {})
    if "share_of_peak" in ours:
        share = ours["share_of_peak"]
        told.append(f"llamahome uses {share['median']:.0%} of the {ours['peak_gflops']:,.0f} GFLOP/s of a large bf16 matrix product.")
    told.append("Every system was fed the same ids and targets." if part["same_rows"] else "The systems were NOT fed the same rows.")
    return told


def page(results: Mapping[str, Any]) -> str:
    """The whole results file."""
    machine = results["machine"]
    told = [f"# {results['date']}: {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB", ""]
    told += [f"`{results['command']}`; torch {machine['torch']}, Python {machine['python']}.", ""]
    for name, part in results["speed"].items():
        told += [
            f"## {part['title']}",
            "",
            f"Scenario `{name}`; {part['words']}.",
            "",
            speed_table(part),
            "",
            " ".join(speed_words(part)),
            "",
        ]
    return "\n".join(told).rstrip() + "\n"
