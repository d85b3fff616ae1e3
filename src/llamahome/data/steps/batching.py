"""Divides the examples of one step over ranks and micro-batches: balanced by cost, few, without padding. Pure and deterministic.

Examples go to ranks in order of decreasing length, each to the rank with the smallest load (Graham's LPT rule, at most 4/3 of the optimum).
Within a rank, best-fit decreasing packing gives the number of micro-batches. The documents are then spread evenly over that many, because
the largest micro-batch decides the memory. Cost: n log n for n examples.
"""

import bisect
import heapq
from collections.abc import Sequence

_EVEN_LENGTH = 4096
"""The length at which attention costs as much as the rest of the layer. Counting operations it is 12 times the hidden size (6,900 for the
starter model), but attention runs at a little over half the rate of large matrix products."""


def cost(length: int) -> float:
    """The work for one document, in tokens of a short document."""
    return length + length * length / _EVEN_LENGTH


def divide(lengths: Sequence[int], *, world_size: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Indices into `lengths` for each rank and micro-batch; result[rank][micro_batch] is ordered by decreasing length.

    Every index occurs exactly once. A micro-batch holds at most `micro_batch_tokens` tokens, or a single longer example. A rank may get no
    micro-batch.
    """
    if world_size < 1 or micro_batch_tokens < 1:
        raise ValueError("world_size and micro_batch_tokens must be at least 1")
    ordered = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for index in ordered:
        load, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (load + cost(lengths[index]), rank))
    packed = [_pack(share, lengths, micro_batch_tokens) for share in shares]
    return [_level(share, packs, lengths, micro_batch_tokens) for share, packs in zip(shares, packed, strict=True)]


def _pack(ordered: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: put each document into the fullest micro-batch that has room for it. `ordered` is longest first."""
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []
    """Free tokens and number of each micro-batch, ascending."""
    for index in ordered:
        length = lengths[index]
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            packs.append([index])
            bisect.insort(free, (max(0, budget - length), len(packs) - 1))
        else:
            room, number = free.pop(at)
            packs[number].append(index)
            bisect.insort(free, (room - length, number))
    return packs


def _level(ordered: Sequence[int], packs: list[list[int]], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """As many micro-batches as `packs`, each document in the one with the fewest tokens; `packs` itself if one would hold too many."""
    level: list[list[int]] = [[] for _ in packs]
    loads = [(0, number) for number in range(len(packs))]
    for index in ordered:
        tokens, number = loads[0]
        if tokens and tokens + lengths[index] > budget:
            return packs
        level[number].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], number))
    return level
