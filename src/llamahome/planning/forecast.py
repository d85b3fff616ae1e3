"""Predicts memory and time of a step on many ranks for each strategy, and finds settings with which a step fits.

Time is operations / rate of the device, plus communication, plus one pass over memory for the update. Communication may overlap with
computation: a forecast has the time without any overlap and the time with full overlap. The first is the prediction, because it is
nearer to published measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llamahome.planning.hardware import Device
from llamahome.planning.memory import TILE_BYTES, Memory, Pass, ShardLayout, memory_of
from llamahome.planning.shapes import ModelShape, flops_per_token
from llamahome.planning.traffic import Collective, count_by_kind, step_collectives, total_seconds, total_sent_bytes

Strategy = Literal["replicate", "shard", "hybrid"]
STRATEGIES: tuple[Strategy, ...] = ("replicate", "shard", "hybrid")
USABLE = 0.92
"""Share of a device's memory that a step may fill; the rest is for the driver and for fragmentation."""
_UPDATE_BYTES_PER_WEIGHT = 28
"""AdamW reads weight, gradient and two moments, and writes weight and moments, in float32."""
_MIN_TOKENS, _MAX_RANKS = 256, 65_536
"""Fewer tokens per micro-batch, or more ranks, are not suggested."""


@dataclass(frozen=True)
class Work:
    """The work of each rank in a step."""

    tokens: int
    """Tokens of one micro-batch."""
    passes: int
    """Micro-batches per step."""
    length: int
    """Tokens of a document."""
    target_share: float
    kept_bytes: int
    """What a micro-batch of `tokens` keeps for its backward pass if nothing is recomputed."""
    recomputed_bytes: int
    """What it keeps at most if layers are recomputed."""
    recomputes: bool | None
    """Gradient checkpointing. None means auto: `largest_share` decides, as in a run."""
    largest_share: float
    """Activations are recomputed if they take more than this share of the memory that weights, gradients and optimizer leave."""
    tile_bytes: int = TILE_BYTES
    """Bytes of a tile of logits in the loss head."""
    offloaded_bytes: int = 0
    """What it keeps at most if the inputs of recomputed layers wait outside of the device's memory."""
    layer_bytes: int = 0
    """Of what it keeps if layers are recomputed: the one that is."""
    offloads: bool | None = False
    """Activation offloading, which recomputes as well. None means auto: only what does not fit otherwise, as in a run."""


@dataclass(frozen=True)
class Cluster:
    """The ranks and their device."""

    device: Device
    ranks: int
    per_node: int


@dataclass(frozen=True)
class Forecast:
    """Memory and time of a step with one strategy."""

    strategy: Strategy
    layout: ShardLayout
    memory: Memory
    recomputes: bool
    offloads: bool
    fits: bool
    exchanges: dict[str, int]
    """Collectives per step by kind."""
    sent_bytes: int
    """Bytes that one rank sends per step."""
    sent_by_formula: int
    """The same by formula."""
    compute_seconds: float
    exchange_seconds: float
    update_seconds: float
    tokens: int
    """Tokens of a step, on all ranks."""

    @property
    def seconds(self) -> float:
        """Time of a step without overlap of communication and computation."""
        return self.compute_seconds + self.exchange_seconds + self.update_seconds

    @property
    def seconds_if_hidden(self) -> float:
        """Time of a step with full overlap of communication and computation."""
        return max(self.compute_seconds, self.exchange_seconds) + self.update_seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second on all ranks."""
        return self.tokens / self.seconds


def layout_of(strategy: Strategy, cluster: Cluster, *, stored: int, computed: int, apart: bool) -> ShardLayout:
    """The distribution of the weights with `strategy`; hybrid shards within a node."""
    shards = {"replicate": 1, "shard": cluster.ranks, "hybrid": min(cluster.per_node, cluster.ranks)}[strategy]
    return ShardLayout(shards, cluster.ranks // shards, stored, computed, apart)


def forecast(
    strategy: Strategy, shape: ModelShape, layout: ShardLayout, cluster: Cluster, *, work: Work, counted: Sequence[Collective] | None = None
) -> Forecast:
    """Predict a step. `counted` are the collectives of a dry run; None uses the formula."""
    device = cluster.device
    memory, placed = _memory(shape, layout, work, device)
    formula = step_collectives(shape, layout, per_node=cluster.per_node, passes=work.passes)
    collectives = formula if counted is None else counted
    per_token = flops_per_token(shape, length=work.length, target_share=work.target_share, recomputes=placed.recomputes)
    updated_weights = shape.trained if layout.apart else shape.trained / layout.shards
    return Forecast(
        strategy=strategy,
        layout=layout,
        memory=memory,
        recomputes=placed.recomputes,
        offloads=placed.offloads,
        fits=memory.total <= USABLE * device.memory_bytes,
        exchanges=count_by_kind(collectives),
        sent_bytes=total_sent_bytes(collectives),
        sent_by_formula=total_sent_bytes(formula),
        compute_seconds=work.passes * work.tokens * per_token / device.flops,
        exchange_seconds=total_seconds(collectives, device),
        update_seconds=updated_weights * _UPDATE_BYTES_PER_WEIGHT / (device.memory_gbps * 1e9),
        tokens=work.passes * work.tokens * cluster.ranks,
    )


def _memory(shape: ModelShape, layout: ShardLayout, work: Work, device: Device) -> tuple[Memory, Pass]:
    """Memory of one rank, and its micro-batch, which says whether activations are recomputed and moved."""
    micro_batch = Pass(
        tokens=work.tokens,
        targets=round(work.tokens * work.target_share),
        kept_bytes=work.kept_bytes,
        recomputed_bytes=work.recomputed_bytes,
        recomputes=bool(work.recomputes),
        several=work.passes > 1,
        tile_bytes=work.tile_bytes,
        offloaded_bytes=work.offloaded_bytes,
        layer_bytes=work.layer_bytes,
    )
    memory = memory_of(shape, layout, micro_batch)
    free = device.memory_bytes - memory.weights - memory.gradients - memory.optimizer
    if work.recomputes is None and work.kept_bytes > work.largest_share * free:
        micro_batch = replace(micro_batch, recomputes=True)
        memory = memory_of(shape, layout, micro_batch)
    tight = micro_batch.recomputes and memory.total > USABLE * device.memory_bytes
    if work.offloads or (work.offloads is None and tight):
        micro_batch = replace(micro_batch, recomputes=True, offloads=True)
        memory = memory_of(shape, layout, micro_batch)
    return memory, micro_batch


def fits_in(shape: ModelShape, layout: ShardLayout, device: Device, work: Work) -> bool:
    """Whether a step fits into the memory of a device."""
    return _memory(shape, layout, work, device)[0].total <= USABLE * device.memory_bytes


def remedy(strategy: Strategy, shape: ModelShape, cluster: Cluster, *, layout: ShardLayout, work: Work) -> str | None:
    """Find options with which `strategy` fits; empty if it fits already, None if there are none."""

    def fits(smaller: Work) -> bool:
        return fits_in(shape, layout, cluster.device, smaller)

    if fits(work):
        return ""
    tokens = work.tokens
    while tokens >= _MIN_TOKENS:
        names = ("kept_bytes", "recomputed_bytes", "offloaded_bytes", "layer_bytes")
        sizes = {name: getattr(work, name) * tokens // work.tokens for name in names}
        if fits(replace(work, tokens=tokens, recomputes=True, **sizes)):
            _, placed = _memory(shape, layout, work, cluster.device)
            options = [] if placed.recomputes else ["--set training.gradient_checkpointing=true"]
            options += [f"--set training.micro_batch_tokens={tokens}"] if tokens < work.tokens else []
            options += [f"--set data.max_length={tokens}"] if tokens < work.length else []
            return " ".join(options)
        tokens //= 2
    if work.passes > 1 and remedy(strategy, shape, cluster, layout=layout, work=replace(work, passes=1)) is not None:
        return "--micro-batches 1"
    if strategy != "shard" or cluster.ranks * 2 > _MAX_RANKS:
        return None
    wider = replace(cluster, ranks=cluster.ranks * 2)
    options_there = remedy(strategy, shape, wider, layout=replace(layout, shards=wider.ranks), work=work)
    if options_there is None or "--world-size" in options_there:
        return options_there
    return f"--world-size {wider.ranks} {options_there}".strip()
