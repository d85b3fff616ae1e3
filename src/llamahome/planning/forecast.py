"""Memory and time of a step on many ranks, for each way to lay the weights, and which way to take.

Time is arithmetic over the rate of the device, plus what the links need, plus a pass over memory for the update. Exchanges may hide
behind arithmetic: the time if none is hidden and the time if all of it is are both told. The first is the prediction, because it is
nearer to published pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llamahome.planning.hardware import Device
from llamahome.planning.memory import TILE_BYTES, Layout, Memory, Pass, memory_of
from llamahome.planning.shapes import Shape, flops_per_token
from llamahome.planning.traffic import Exchange, counts, exchanges, seconds_of, sent_bytes

Strategy = Literal["replicate", "shard", "hybrid"]
STRATEGIES: tuple[Strategy, ...] = ("replicate", "shard", "hybrid")
USABLE = 0.92
"""Share of a device's memory that a step may fill: the rest is the driver's, and gaps between blocks."""
_UPDATE_BYTES = 28
"""AdamW reads weight, gradient and two moments and writes three of them, in float32."""
_FEWEST_TOKENS = 256


@dataclass(frozen=True)
class Work:
    """What each rank does in a step."""

    tokens: int
    """Of one pass."""
    passes: int
    length: int
    """Of a document."""
    target_share: float
    kept_bytes: int
    """What a pass of `tokens` keeps for the backward pass when nothing is recomputed."""
    recomputes: bool | None
    """Gradient checkpointing; None decides by `largest_share`, as a run does."""
    largest_share: float
    """Of the memory that weights, gradients and optimizer leave, which activations may take before they are recomputed."""
    tile_bytes: int = TILE_BYTES
    """Of the loss head's tile of logits."""


@dataclass(frozen=True)
class Cluster:
    """The ranks."""

    device: Device
    ranks: int
    per_node: int


@dataclass(frozen=True)
class Forecast:
    """What a step takes with one strategy."""

    strategy: Strategy
    layout: Layout
    memory: Memory
    recomputes: bool
    fits: bool
    exchanges: dict[str, int]
    """How many of each kind in a step."""
    sent_bytes: int
    """By one rank in a step."""
    sent_by_formula: int
    compute_seconds: float
    exchange_seconds: float
    update_seconds: float
    tokens: int
    """Of a step, on all ranks."""

    @property
    def seconds(self) -> float:
        """Of a step, when no exchange hides behind arithmetic."""
        return self.compute_seconds + self.exchange_seconds + self.update_seconds

    @property
    def seconds_if_hidden(self) -> float:
        """Of a step, when exchanges and arithmetic go on at once."""
        return max(self.compute_seconds, self.exchange_seconds) + self.update_seconds

    @property
    def tokens_per_s(self) -> float:
        """On all ranks together."""
        return self.tokens / self.seconds


def layout_of(strategy: Strategy, cluster: Cluster, *, stored: int, computed: int, apart: bool) -> Layout:
    """How a strategy lays the weights over the ranks; hybrid cuts inside a machine."""
    shards = {"replicate": 1, "shard": cluster.ranks, "hybrid": min(cluster.per_node, cluster.ranks)}[strategy]
    return Layout(shards, cluster.ranks // shards, stored, computed, apart)


def forecast(
    strategy: Strategy, shape: Shape, layout: Layout, cluster: Cluster, *, work: Work, counted: Sequence[Exchange] | None = None
) -> Forecast:
    """Predict a step; `counted` are the exchanges that the placed model made, None takes those of the formula."""
    device, room = cluster.device, USABLE * cluster.device.memory_bytes
    memory, recomputes = _memory(shape, layout, work, device)
    formula = exchanges(shape, layout, per_node=cluster.per_node, passes=work.passes)
    made = formula if counted is None else counted
    per_token = flops_per_token(shape, length=work.length, target_share=work.target_share, recomputes=recomputes)
    updated = shape.trained if layout.apart else shape.trained / layout.shards
    return Forecast(
        strategy=strategy,
        layout=layout,
        memory=memory,
        recomputes=recomputes,
        fits=memory.total <= room,
        exchanges=counts(made),
        sent_bytes=sent_bytes(made),
        sent_by_formula=sent_bytes(formula),
        compute_seconds=work.passes * work.tokens * per_token / device.flops,
        exchange_seconds=seconds_of(made, device),
        update_seconds=updated * _UPDATE_BYTES / (device.memory_gbps * 1e9),
        tokens=work.passes * work.tokens * cluster.ranks,
    )


def _memory(shape: Shape, layout: Layout, work: Work, device: Device) -> tuple[Memory, bool]:
    """What one rank holds, and whether it recomputes."""
    one = Pass(
        work.tokens, round(work.tokens * work.target_share), work.kept_bytes, bool(work.recomputes), work.passes > 1, work.tile_bytes
    )
    memory = memory_of(shape, layout, one)
    free = device.memory_bytes - memory.weights - memory.gradients - memory.optimizer
    if work.recomputes is None and work.kept_bytes > work.largest_share * free:
        return memory_of(shape, layout, replace(one, recomputes=True)), True
    return memory, one.recomputes


def remedy(strategy: Strategy, shape: Shape, cluster: Cluster, *, layout: Layout, work: Work) -> str | None:
    """Settings with which this strategy fits, tried out; None when there are none."""
    room = USABLE * cluster.device.memory_bytes
    if _memory(shape, layout, work, cluster.device)[0].total <= room:
        return ""
    tokens = work.tokens
    while tokens >= _FEWEST_TOKENS:
        less = replace(work, tokens=tokens, kept_bytes=work.kept_bytes * tokens // work.tokens, recomputes=True)
        if _memory(shape, layout, less, cluster.device)[0].total <= room:
            words = [] if _memory(shape, layout, work, cluster.device)[1] else ["--set training.gradient_checkpointing=true"]
            words += [f"--set training.micro_batch_tokens={tokens}"] if tokens < work.tokens else []
            words += [f"--set data.max_length={tokens}"] if tokens < work.length else []
            return " ".join(words)
        tokens //= 2
    if work.passes > 1 and remedy(strategy, shape, cluster, layout=layout, work=replace(work, passes=1)) is not None:
        return "--micro-batches 1"
    if strategy != "shard":
        return None
    wider = replace(cluster, ranks=cluster.ranks * 2)
    if wider.ranks > 65_536:
        return None
    more = remedy(strategy, shape, wider, layout=replace(layout, shards=wider.ranks), work=work)
    return more if more is None or "--world-size" in more else f"--world-size {wider.ranks} {more}".strip()
