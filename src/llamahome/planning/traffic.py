"""Counts the collectives of a step, the bytes that one rank sends in them, and their time.

All collectives are assumed to be rings. Over n ranks and S bytes in total, each rank sends (n - 1) / n * S in an all-gather or a
reduce-scatter and twice that in an all-reduce. A ring over several nodes runs at the rate of all network adapters of the ring's ranks on
one node, and each hop costs latency. Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
MPICH" (2005), section 4.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llamahome.planning.hardware import Device
from llamahome.planning.memory import FLOAT32, ShardLayout
from llamahome.planning.shapes import ModelShape

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class RankGroup:
    """The ranks of a collective."""

    ranks: int
    per_node: int
    """Ranks of the group on one node."""

    @property
    def crosses(self) -> bool:
        """Whether the group has ranks on several nodes."""
        return self.ranks > self.per_node


@dataclass(frozen=True)
class Collective:
    """One kind of collective of one size, and how often a step runs it."""

    kind: Kind
    whole_bytes: int
    """Bytes of the full tensor: the gathered one, or the one that is reduced."""
    group: RankGroup
    count: int = 1

    @property
    def sent_bytes(self) -> float:
        """Bytes that one rank sends in all `count` of them."""
        rings = 2 if self.kind == "all_reduce" else 1
        return self.count * rings * (self.group.ranks - 1) / self.group.ranks * self.whole_bytes

    def seconds(self, device: Device) -> float:
        """Time of all `count` of them one after the other, on idle links."""
        inside = device.inside_gbps / 8 * 1e9
        rate = min(inside, device.between_gbps / 8 * 1e9 * self.group.per_node) if self.group.crosses else inside
        hops = (2 if self.kind == "all_reduce" else 1) * (self.group.ranks - 1)
        return self.sent_bytes / rate + self.count * hops * device.hop_seconds


def step_collectives(shape: ModelShape, layout: ShardLayout, *, per_node: int, passes: int) -> list[Collective]:
    """The large collectives of a step of `passes` micro-batches, by formula.

    Replicated: one all-reduce of all gradients. Sharded: in every micro-batch each layer is gathered for the forward and again for the
    backward pass, and the rest is gathered once; the gradients of sharded weights are reduce-scattered once per step, or after every
    micro-batch if `layout.sums_each_pass`; several copies of a sharded model then all-reduce their shards once per step. The gradients
    of adapters are all-reduced over all ranks.
    """
    if layout.ranks == 1:
        return []
    all_ranks = RankGroup(layout.ranks, min(per_node, layout.ranks))
    collectives = [Collective("all_reduce", shape.trained * FLOAT32, all_ranks)] if layout.apart or layout.shards == 1 else []
    if layout.shards == 1:
        return collectives
    shard_group = RankGroup(layout.shards, min(per_node, layout.shards))
    copy_group = RankGroup(layout.copies, max(1, min(per_node, layout.ranks) // layout.shards))
    for part, number, is_layer in ((shape.layer, shape.layers, True), (shape.rest, 1, False)):
        gathered = layout.gathered(part, inside_layer=is_layer)
        collectives.append(Collective("all_gather", gathered, shard_group, passes * number * (2 if is_layer else 1)))
        if part.trained and not layout.apart:
            gradients, sums = part.trained * FLOAT32, number * (passes if layout.sums_each_pass else 1)
            collectives.append(Collective("reduce_scatter", gradients, shard_group, sums))
            if layout.copies > 1:
                collectives.append(Collective("all_reduce", gradients // layout.shards, copy_group, number))
    return collectives


def total_sent_bytes(collectives: Sequence[Collective]) -> int:
    """Bytes that one rank sends in all of them."""
    return round(sum(collective.sent_bytes for collective in collectives))


def total_seconds(collectives: Sequence[Collective], device: Device) -> float:
    """Time of all of them, one after the other."""
    return sum(collective.seconds(device) for collective in collectives)


def count_by_kind(collectives: Sequence[Collective]) -> dict[str, int]:
    """Number of collectives of each kind."""
    counts: Counter[str] = Counter()
    for collective in collectives:
        counts[collective.kind] += collective.count
    return dict(sorted(counts.items()))


def extended(shallow: Sequence[Collective], deep: Sequence[Collective], *, depths: tuple[int, int], layers: int) -> list[Collective]:
    """Extrapolate from the collectives of models with `depths` layers to those of a model with `layers` layers.

    Each further layer is assumed to add the same: to the count of a collective that both models have, or to the size of one that differs
    between them (an all-reduce of all gradients). Raises ValueError if neither explains the difference.
    """
    few, many = _count_each(shallow), _count_each(deep)

    def extrapolate(first: int, second: int) -> int:
        growth, remainder = divmod((second - first) * (layers - depths[0]), depths[1] - depths[0])
        if remainder or first + growth < 0:
            raise ValueError("not every layer adds the same")
        return first + growth

    result = [replace(shared, count=extrapolate(few[shared], many[shared])) for shared in few.keys() & many.keys()]
    only_few = sorted(few.keys() - many.keys(), key=_sort_key)
    only_many = sorted(many.keys() - few.keys(), key=_sort_key)
    if len(only_few) > 1 or [(c.kind, c.group, few[c]) for c in only_few] != [(c.kind, c.group, many[c]) for c in only_many]:
        raise ValueError("a collective of one depth has no counterpart at the other depth")
    for old, new in zip(only_few, only_many, strict=True):
        result.append(replace(old, whole_bytes=extrapolate(old.whole_bytes, new.whole_bytes), count=few[old]))
    return sorted((collective for collective in result if collective.count), key=_sort_key)


def _sort_key(collective: Collective) -> tuple[str, int, int, int]:
    return collective.kind, collective.group.ranks, collective.group.per_node, collective.whole_bytes


def _count_each(collectives: Sequence[Collective]) -> Counter[Collective]:
    """Count by kind, size and group; the keys have count 1."""
    counts: Counter[Collective] = Counter()
    for collective in collectives:
        counts[replace(collective, count=1)] += collective.count
    return counts
