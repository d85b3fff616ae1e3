"""Medians, ranges and ratios of what was measured, and the arithmetic that a step needs. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    def told(self) -> dict[str, float]:
        """For the results file."""
        return {"median": self.median, "low": self.low, "high": self.high}


def spread(values: Sequence[float]) -> Spread:
    """Median and range; there is at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Shape:
    """What decides the arithmetic of a decoder with gated MLPs."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From a config.json."""
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
    """Operations of all matrix products that a step cannot do without: nothing done twice, no padding, the head on targets alone.

    `squares` is the sum of the squared lengths of the rows: attention is causal, so half of the scores are needed. With LoRA of `rank` a
    frozen matrix costs 4 operations a weight and token (forward, gradient of the input), a trained one 6; without, every one costs 6.
    """
    weights = sum(inputs * outputs for inputs, outputs in shape.matrices()) * shape.layers
    adapters = 0 if rank is None else sum(rank * (inputs + outputs) for inputs, outputs in shape.matrices()) * shape.layers
    frozen = 6.0 if rank is None else 4.0
    attention = 6.0 * squares * shape.heads * shape.head_width * shape.layers
    return tokens * (frozen * weights + 6.0 * adapters) + targets * frozen * shape.hidden * shape.vocabulary + attention


def summary_of(system: Mapping[str, Any], *, shape: Shape | None = None, rank: int | None = None) -> dict[str, Any]:
    """Speed, memory and hash of one system over its rounds; its error when it has none."""
    if "error" in system or not system["rounds"]:
        return {"title": system["title"], "error": system.get("error", "no rounds")}
    rounds = system["rounds"]
    sums = [{name: sum(step[name] for step in each["steps"]) for name in ("tokens", "targets", "squares")} for each in rounds]
    seconds = [each["seconds"] for each in rounds]
    told: dict[str, Any] = {
        "title": system["title"],
        "tuned": system["tuned"],
        "tokens_per_s": _rates(sums, seconds, "tokens"),
        "targets_per_s": _rates(sums, seconds, "targets"),
        "peak_bytes": rounds[-1]["peak"],
        "hash": rounds[-1]["hash"],
        "losses": [step["loss"] for each in rounds for step in each["steps"]],
    }
    if shape is not None and "peak_flops" in system:
        shares = [needed_flops(shape, **each, rank=rank) / taken / system["peak_flops"] for each, taken in zip(sums, seconds, strict=True)]
        told |= {"peak_gflops": system["peak_flops"] / 1e9, "share_of_peak": spread(shares).told()}
    return told


def _rates(sums: Sequence[Mapping[str, int]], seconds: Sequence[float], name: str) -> dict[str, float]:
    return spread([each[name] / taken for each, taken in zip(sums, seconds, strict=True)]).told()


def paired_ratio(ours: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast ours is, round by round, for each round has the same rows for both; `beside` are ours of its own rounds."""
    pairs = zip(other.get("beside", ours["rounds"]), other["rounds"], strict=False)
    return spread([theirs["seconds"] / own["seconds"] for own, theirs in pairs]).told()


def compared(systems: Mapping[str, Mapping[str, Any]], *, shape: Shape | None = None, rank: int | None = None) -> dict[str, Any]:
    """Everything that is said of one scenario: each system, ratios, the best tuned peer, whether all were fed the same."""
    told = {name: summary_of(each, shape=shape, rank=rank) for name, each in systems.items()}
    ours = systems.get("ours")
    if ours is not None and "error" not in told["ours"]:
        for name, each in systems.items():
            if name != "ours" and "error" not in told[name]:
                told[name]["times_as_fast"] = paired_ratio(ours, each)
                told[name]["memory_ratio"] = told["ours"]["peak_bytes"] / told[name]["peak_bytes"]
    fine = {name: each for name, each in told.items() if "error" not in each}
    tuned = [name for name, each in fine.items() if name not in ("ours", "plain") and each["tuned"]]
    best = max(tuned, key=lambda name: fine[name]["tokens_per_s"]["median"], default=None)
    return {"systems": told, "best_peer": best, "same_rows": len({each["hash"] for each in fine.values()}) <= 1}
