"""Medians, ranges and ratios of measurements, and the operations that a step needs. Pure functions."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median and range of several measurements."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """The content for the results file."""
        return {"median": self.median, "low": self.low, "high": self.high}


def spread(values: Sequence[float]) -> Spread:
    """Median and range of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated MLPs that decide its operations."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """Read the sizes from the content of a config.json."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        mlp = [(self.hidden, self.inner)] * 2 + [(self.inner, self.hidden)]
        return [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden), *mlp]


def needed_flops(shape: Shape, *, tokens: int, targets: int, squares: int, rank: int | None) -> float:
    """Operations of the matrix products that a step needs: no recomputation, no padding, the head on targets only.

    `squares` is the sum of the squared lengths of the rows; attention is causal, so half of the scores are needed. With LoRA of `rank`, a
    frozen matrix costs 4 operations per weight and token (forward, gradient of the input) and a trained matrix 6; without LoRA all cost 6.
    """
    weights = sum(inputs * outputs for inputs, outputs in shape.matrices()) * shape.layers
    adapters = 0 if rank is None else sum(rank * (inputs + outputs) for inputs, outputs in shape.matrices()) * shape.layers
    frozen = 6.0 if rank is None else 4.0
    attention = 6.0 * squares * shape.heads * shape.head_width * shape.layers
    return tokens * (frozen * weights + 6.0 * adapters) + targets * frozen * shape.hidden * shape.vocabulary + attention


def summarize(system: Mapping[str, Any], *, shape: Shape | None = None, rank: int | None = None) -> dict[str, Any]:
    """Speed, memory and hash of one system over its rounds, or its error."""
    if "error" in system or not system["rounds"]:
        return {"title": system["title"], "error": system.get("error", "no rounds")}
    rounds = system["rounds"]
    sums = [{name: sum(step[name] for step in each["steps"]) for name in ("tokens", "targets", "squares")} for each in rounds]
    seconds = [each["seconds"] for each in rounds]
    summary: dict[str, Any] = {
        "title": system["title"],
        "tuned": system["tuned"],
        "tokens_per_s": _rates(sums, seconds, "tokens"),
        "targets_per_s": _rates(sums, seconds, "targets"),
        "peak_bytes": rounds[-1]["peak"],
        "hash": rounds[-1]["hash"],
        "losses": [step["loss"] for each in rounds for step in each["steps"]],
    }
    if shape is not None and "peak_flops" in system:
        shares = [needed_flops(shape, **each, rank=rank) / time / system["peak_flops"] for each, time in zip(sums, seconds, strict=True)]
        summary |= {"peak_gflops": system["peak_flops"] / 1e9, "share_of_peak": spread(shares).as_dict()}
    return summary


def _rates(sums: Sequence[Mapping[str, int]], seconds: Sequence[float], name: str) -> dict[str, float]:
    return spread([each[name] / time for each, time in zip(sums, seconds, strict=True)]).as_dict()


def paired_ratio(ours: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast llamahome is, by round, because both have the same rows in a round. `beside` are llamahome's rounds."""
    pairs = zip(other.get("beside", ours["rounds"]), other["rounds"], strict=False)
    return spread([theirs["seconds"] / own["seconds"] for own, theirs in pairs]).as_dict()


def compare(systems: Mapping[str, Mapping[str, Any]], *, shape: Shape | None = None, rank: int | None = None) -> dict[str, Any]:
    """Compare the systems of one scenario: speeds, ratios, the best tuned peer, and whether all got the same rows."""
    summaries = {name: summarize(each, shape=shape, rank=rank) for name, each in systems.items()}
    ours = systems.get("ours")
    if ours is not None and "error" not in summaries["ours"]:
        for name, each in systems.items():
            if name != "ours" and "error" not in summaries[name]:
                summaries[name]["times_as_fast"] = paired_ratio(ours, each)
                summaries[name]["memory_ratio"] = summaries["ours"]["peak_bytes"] / summaries[name]["peak_bytes"]
    measured = {name: each for name, each in summaries.items() if "error" not in each}
    tuned = [name for name, each in measured.items() if name not in ("ours", "plain") and each["tuned"]]
    best = max(tuned, key=lambda name: measured[name]["tokens_per_s"]["median"], default=None)
    return {"systems": summaries, "best_peer": best, "same_rows": len({each["hash"] for each in measured.values()}) <= 1}
