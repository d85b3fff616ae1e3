"""What ranks send each other in a step, how many bytes that is for one of them, and how long it takes.

Exchanges are rings: of a whole of S bytes over n ranks each sends (n - 1) / n * S for a gathering or a scattered sum and twice that for
a sum that all get. A ring that crosses machines runs at the pace of the network adapters that its ranks of one machine have together,
and pays for every hop. Source of the arithmetic: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations
in MPICH" (2005), section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llamahome.planning.hardware import Device
from llamahome.planning.memory import FLOAT32, Layout
from llamahome.planning.shapes import Shape

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Group:
    """The ranks of one exchange."""

    ranks: int
    per_node: int
    """How many of them sit on one machine."""

    @property
    def crosses(self) -> bool:
        """Whether it needs the network."""
        return self.ranks > self.per_node


@dataclass(frozen=True)
class Exchange:
    """Equal exchanges of a step."""

    kind: Kind
    whole_bytes: int
    """What all ranks of the group have together when it is done."""
    group: Group
    count: int = 1

    @property
    def sent_bytes(self) -> float:
        """By one rank, in all of them."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return self.count * rounds * (self.group.ranks - 1) / self.group.ranks * self.whole_bytes

    def seconds(self, device: Device) -> float:
        """All of them one after the other, with nothing else on the links."""
        inside = device.inside_gbps / 8 * 1e9
        rate = min(inside, device.between_gbps / 8 * 1e9 * self.group.per_node) if self.group.crosses else inside
        hops = (2 if self.kind == "all_reduce" else 1) * (self.group.ranks - 1)
        return self.sent_bytes / rate + self.count * hops * device.hop_seconds


def exchanges(shape: Shape, layout: Layout, *, per_node: int, passes: int) -> list[Exchange]:
    """The large exchanges of a step of `passes` micro-batches, from arithmetic alone.

    Replicated: one sum of all gradients. Sharded: in every pass each layer is gathered for the forward and again for the backward pass,
    the rest once, and the gradients of cut weights are summed into shards once per step, or in every pass where the layout says so;
    several copies of a sharded model then sum their shards, once per step. Adapters are summed whole over all ranks.
    """
    if layout.ranks == 1:
        return []
    everyone = Group(layout.ranks, min(per_node, layout.ranks))
    found = [Exchange("all_reduce", shape.trained * FLOAT32, everyone)] if layout.apart or layout.shards == 1 else []
    if layout.shards == 1:
        return found
    inside = Group(layout.shards, min(per_node, layout.shards))
    across = Group(layout.copies, max(1, min(per_node, layout.ranks) // layout.shards))
    for part, times, in_layer in ((shape.layer, shape.layers, True), (shape.rest, 1, False)):
        whole = layout.gathered(part, inside_layer=in_layer)
        found.append(Exchange("all_gather", whole, inside, passes * times * (2 if in_layer else 1)))
        if part.trained and not layout.apart:
            found.append(Exchange("reduce_scatter", part.trained * FLOAT32, inside, times * (passes if layout.sums_each_pass else 1)))
            if layout.copies > 1:
                found.append(Exchange("all_reduce", part.trained * FLOAT32 // layout.shards, across, times))
    return found


def sent_bytes(found: Sequence[Exchange]) -> int:
    """By one rank in a step."""
    return round(sum(each.sent_bytes for each in found))


def seconds_of(found: Sequence[Exchange], device: Device) -> float:
    """Of all exchanges of a step, one after the other."""
    return sum(each.seconds(device) for each in found)


def counts(found: Sequence[Exchange]) -> dict[str, int]:
    """How many of each kind in a step."""
    kinds: dict[str, int] = {}
    for each in found:
        kinds[each.kind] = kinds.get(each.kind, 0) + each.count
    return dict(sorted(kinds.items()))


def extended(shallow: Sequence[Exchange], deep: Sequence[Exchange], *, depths: tuple[int, int], layers: int) -> list[Exchange]:
    """What a model of `layers` exchanges, from what models of two depths did: each further layer adds the same again.

    An exchange that both made comes more often, one that changed its size (a flat one of all gradients) grows. Raises ValueError when
    neither explains the difference.
    """
    few, many = _tally(shallow), _tally(deep)

    def at(first: int, second: int) -> int:
        more, left = divmod((second - first) * (layers - depths[0]), depths[1] - depths[0])
        if left or first + more < 0:
            raise ValueError("not every layer adds the same")
        return first + more

    found = [replace(each, count=at(few[each], many[each])) for each in few.keys() & many.keys()]
    gone, new = (sorted(ours.keys() - others.keys(), key=_rank) for ours, others in ((few, many), (many, few)))
    if len(gone) > 1 or [(each.kind, each.group, few[each]) for each in gone] != [(each.kind, each.group, many[each]) for each in new]:
        raise ValueError("an exchange of one depth has no like at the other")
    pairs = zip(gone, new, strict=True)
    found += [replace(old, whole_bytes=at(old.whole_bytes, now.whole_bytes), count=few[old]) for old, now in pairs]
    return sorted((each for each in found if each.count), key=_rank)


def _rank(each: Exchange) -> tuple[str, int, int, int]:
    return each.kind, each.group.ranks, each.group.per_node, each.whole_bytes


def _tally(found: Sequence[Exchange]) -> dict[Exchange, int]:
    tally: dict[Exchange, int] = {}
    for each in found:
        single = replace(each, count=1)
        tally[single] = tally.get(single, 0) + each.count
    return tally
