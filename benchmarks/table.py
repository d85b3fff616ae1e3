"""Results as Markdown. Pure: a results file gives the same text everywhere."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ranged(value: Mapping[str, float], digits: int = 0) -> str:
    """`750 (741 to 760)`."""
    return f"{value['median']:,.{digits}f} ({value['low']:,.{digits}f} to {value['high']:,.{digits}f})"


def speed_table(part: Mapping[str, Any]) -> str:
    """One scenario: a row per system."""
    rows = []
    for name, each in part["systems"].items():
        if "error" in each:
            rows.append([each["title"], "-", "-", "-", "-", each["error"].replace("|", "/")])
            continue
        times = ranged(each["times_as_fast"], 2) if "times_as_fast" in each else "1" if name == "ours" else "-"
        speeds = [ranged(each["tokens_per_s"]), ranged(each["targets_per_s"])]
        rows.append([each["title"], *speeds, f"{each['peak_bytes'] / 1e9:.1f}", times, f"`{each['hash']}`"])
    head = ["system", "tokens/s", "targets/s", "peak GB", "llamahome is faster by", "hash of ids and targets"]
    return markdown(head, rows)


def speed_words(part: Mapping[str, Any]) -> list[str]:
    """What is to be said below the table."""
    told = []
    ours = part["systems"].get("ours", {})
    if "share_of_peak" in ours:
        share = ours["share_of_peak"]
        told.append(f"llamahome uses {share['median']:.0%} of the {ours['peak_gflops']:,.0f} GFLOP/s of a large matrix product.")
    told.append("Every system was fed the same ids and targets." if part["same_rows"] else "The systems were NOT fed the same rows.")
    return told


def start_lines(part: Mapping[str, Any]) -> list[str]:
    """The start part: tables and what is to be said of checkpoints, resuming and preparation."""
    rows = []
    for each in part["systems"].values():
        if "error" in each or not each["rounds"]:
            rows.append([each["title"], "-", "-", "-", each.get("error", "no rounds").replace("|", "/")])
            continue
        middle = {name: statistics.median(one[name] for one in each["rounds"]) for name in ("first", "twentieth", "peak")}
        cold = f"{each['cold']['first']:.1f}"
        rows.append([each["title"], f"{middle['first']:.1f}", f"{middle['twentieth']:.1f}", f"{middle['peak'] / 1e9:.1f}", cold])
    told = [markdown(["system", "s to step 1", f"s to step {part['steps']}", "peak GB", "s to step 1, first time"], rows), ""]
    if "resume" in part:
        resume = part["resume"]
        told.append(f"- resuming to the first step: {resume.get('error') or ranged(resume, 1) + ' s'}")
    if "checkpoint" in part:
        save = part["checkpoint"]
        words = save.get("error") or (
            f"the loop waits {save['seconds']:.3f} s, {save['of_a_step']:.1%} of the time of one step"
            f" and {save['of_training']:.3%} of training at the default interval"
        )
        if "beside" in save:
            words += f"; a token of the step beside which it is written takes {save['beside']:+.0%}"
        told.append(f"- a checkpoint: {words}")
    preparation = part["preparation"]
    rates = preparation.get("rows_per_s", {})
    shown = ", ".join(f"{name} {rate:,}" for name, rate in rates.items())
    told.append(f"- rows prepared a second: {preparation.get('error') or shown}")
    return told


def quality_line(part: Mapping[str, Any]) -> str:
    """Loss on held-out rows after one pass."""
    if "error" in part:
        return f"{part['method']}: {part['error']}"
    return (
        f"{part['method']}: {part['before']:.4f} before, {part['ours']:.4f} after llamahome, {part['trl-fp32']:.4f} after TRL in float32:"
        f" {part['difference']:+.2%} ({part['steps']} steps over {part['rows']} rows, {part['held_out']} held out)"
    )


def page(results: Mapping[str, Any]) -> str:
    """The whole results file."""
    machine = results["machine"]
    told = [f"# {results['date']}: {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB", ""]
    told += [f"{', '.join(f'`{one}`' for one in results['commands'])}; torch {machine['torch']}, Python {machine['python']}.", ""]
    for name, part in [*results["speed"].items(), *results["length"].items()]:
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
    if "start" in results:
        told += ["## From the start of the process", "", *start_lines(results["start"]), ""]
    if results["quality"]:
        told += ["## Held-out loss", "", *(f"- {quality_line(part)}" for part in results["quality"].values()), ""]
    return "\n".join(told).rstrip() + "\n"
