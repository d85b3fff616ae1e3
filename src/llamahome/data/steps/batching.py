"""The examples of one step to micro-batches on ranks: balanced by cost, few, without padding. Pure and deterministic.

Ranks get examples largest first, each to the least loaded (Graham's LPT rule, at most 4/3 of the best); within a rank documents are packed
best-fit decreasing, which says how many micro-batches are needed, and then levelled, for the largest of them takes the memory.
Cost: n log n for n examples.
"""

import bisect
import heapq
from collections.abc import Sequence

_EVEN_LENGTH = 4096
"""Length at which attention costs as much as all the rest of a token. By operations it is 12 times the hidden size (6,900 for the starter);
attention runs at a little over half the rate of large matrix products."""


def cost(length: int) -> float:
    """Work of one document, in tokens of a short document."""
    return length + length * length / _EVEN_LENGTH


def divide(lengths: Sequence[int], *, world_size: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Indices into `lengths` for each rank and micro-batch: result[rank][micro-batch] is longest first.

    Every index comes exactly once. A micro-batch holds at most `micro_batch_tokens` tokens, or one longer example alone.
    A rank may get none.
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
    """Best-fit decreasing: each document into the micro-batch that it fills up most; `ordered` is longest first."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """Room left and number of each micro-batch, ascending."""
    for index in ordered:
        length = lengths[index]
        at = bisect.bisect_left(rooms, (length, -1))
        if at == len(rooms):
            packs.append([index])
            bisect.insort(rooms, (max(0, budget - length), len(packs) - 1))
        else:
            room, number = rooms.pop(at)
            packs[number].append(index)
            bisect.insort(rooms, (room - length, number))
    return packs


def _level(ordered: Sequence[int], packs: list[list[int]], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """As many micro-batches, each document to the one with the fewest tokens; `packs` as they are when one would hold too many."""
    level: list[list[int]] = [[] for _ in packs]
    loads = [(0, number) for number in range(len(packs))]
    for index in ordered:
        tokens, number = loads[0]
        if tokens and tokens + lengths[index] > budget:
            return packs
        level[number].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], number))
    return level
