"""Formats results as Markdown. Pure functions."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    table = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def with_range(value: Mapping[str, float], digits: int = 0) -> str:
    """Format median and range: `750 (741 to 760)`."""
    return f"{value['median']:,.{digits}f} ({value['low']:,.{digits}f} to {value['high']:,.{digits}f})"


def speed_table(part: Mapping[str, Any]) -> str:
    """Format one scenario with a row per system."""
    rows = []
    for name, each in part["systems"].items():
        if "error" in each:
            rows.append([each["title"], "-", "-", "-", "-", each["error"].replace("|", "/")])
            continue
        times = with_range(each["times_as_fast"], 2) if "times_as_fast" in each else "1" if name == "ours" else "-"
        speeds = [with_range(each["tokens_per_s"]), with_range(each["targets_per_s"])]
        rows.append([each["title"], *speeds, f"{each['peak_bytes'] / 1e9:.1f}", times, f"`{each['hash']}`"])
    head = ["system", "tokens/s", "targets/s", "peak GB", "llamahome is faster by", "hash of ids and targets"]
    return markdown(head, rows)


def speed_notes(part: Mapping[str, Any]) -> list[str]:
    """The sentences below the table."""
    lines = []
    ours = part["systems"].get("ours", {})
    if "share_of_peak" in ours:
        share = ours["share_of_peak"]
        lines.append(f"llamahome uses {share['median']:.0%} of the {ours['peak_gflops']:,.0f} GFLOP/s of a large matrix product.")
    lines.append("Every system was fed the same ids and targets." if part["same_rows"] else "The systems were NOT fed the same rows.")
    return lines


def start_lines(part: Mapping[str, Any]) -> list[str]:
    """The start part: the table, and lines about resuming, checkpoints and preparation."""
    rows = []
    for each in part["systems"].values():
        if "error" in each or not each["rounds"]:
            rows.append([each["title"], "-", "-", "-", each.get("error", "no rounds").replace("|", "/")])
            continue
        median = {name: statistics.median(one[name] for one in each["rounds"]) for name in ("first", "twentieth", "peak")}
        cold = f"{each['cold']['first']:.1f}"
        rows.append([each["title"], f"{median['first']:.1f}", f"{median['twentieth']:.1f}", f"{median['peak'] / 1e9:.1f}", cold])
    lines = [markdown(["system", "s to step 1", f"s to step {part['steps']}", "peak GB", "s to step 1, first time"], rows), ""]
    if "resume" in part:
        resume = part["resume"]
        lines.append(f"- resuming to the first step: {resume.get('error') or with_range(resume, 1) + ' s'}")
    if "checkpoint" in part:
        save = part["checkpoint"]
        text = save.get("error") or (
            f"the loop waits {save['seconds']:.3f} s, {save['of_a_step']:.1%} of the time of one step"
            f" and {save['of_training']:.3%} of training at the default interval"
        )
        if "beside" in save:
            text += f"; a token of the step beside which it is written takes {save['beside']:+.0%}"
        lines.append(f"- a checkpoint: {text}")
    preparation = part["preparation"]
    rates = preparation.get("rows_per_s", {})
    rates_text = ", ".join(f"{name} {rate:,}" for name, rate in rates.items())
    lines.append(f"- rows prepared a second: {preparation.get('error') or rates_text}")
    return lines


def quality_line(part: Mapping[str, Any]) -> str:
    """Loss on held-out rows after one epoch."""
    if "error" in part:
        return f"{part['method']}: {part['error']}"
    return (
        f"{part['method']}: {part['before']:.4f} before, {part['ours']:.4f} after llamahome, {part['trl-fp32']:.4f} after TRL in float32:"
        f" {part['difference']:+.2%} ({part['steps']} steps over {part['rows']} rows, {part['held_out']} held out)"
    )


def page(results: Mapping[str, Any]) -> str:
    """Format the whole results file."""
    machine = results["machine"]
    lines = [f"# {results['date']}: {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB", ""]
    lines += [f"{', '.join(f'`{one}`' for one in results['commands'])}; torch {machine['torch']}, Python {machine['python']}.", ""]
    for name, part in [*results["speed"].items(), *results["length"].items()]:
        lines += [
            f"## {part['title']}",
            "",
            f"Scenario `{name}`; {part['words']}.",
            "",
            speed_table(part),
            "",
            " ".join(speed_notes(part)),
            "",
        ]
    if "start" in results:
        lines += ["## From the start of the process", "", *start_lines(results["start"]), ""]
    if results["quality"]:
        lines += ["## Held-out loss", "", *(f"- {quality_line(part)}" for part in results["quality"].values()), ""]
    return "\n".join(lines).rstrip() + "\n"
