"""How the examples of a step lie in a micro-batch: end to end, those of a row together if the row is learned as a whole.

The tokens that all examples of such a row begin with, such as the prompt of a pair of answers, are counted here, so that a back end can
compute them once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from llamahome.data.records import Example, Microbatch, Together
from llamahome.data.store.table import ExampleTable


@dataclass(frozen=True)
class Layout:
    """How the examples of a row lie in micro-batches."""

    whole_rows: bool = False
    """Whether the examples of a row, such as the two answers of a pair, lie one after the other in one micro-batch."""
    shares: bool = False
    """Whether tokens that all examples of a row begin with are computed once, and so count once against the budget."""


EACH_ALONE = Layout()


def make_microbatch(examples: Sequence[Example], *, keys: Sequence[int], index: int, groups: Sequence[Together] = ()) -> Microbatch:
    """The examples end to end, in their order."""
    lengths = tuple(len(example.tokens) for example in examples)
    tokens = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    targets = np.flatnonzero(np.concatenate([example.targets for example in examples]))
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    known = [example.known for example in examples if example.known is not None]
    return Microbatch(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        lengths=lengths,
        rows_N=torch.from_numpy(targets - 1),
        labels_N=torch.from_numpy(tokens[targets]),
        targets=tuple(int(np.count_nonzero(example.targets)) for example in examples),
        groups=tuple(groups),
        known_D=torch.tensor(known, dtype=torch.float32) if len(known) == len(examples) else None,
        good=tuple(example.good for example in examples),
        keys=tuple(keys),
        index=index,
    )


def idle_microbatch(*, index: int) -> Microbatch:
    """One token of no row, from which nothing is learned."""
    one, none = (torch.from_numpy(np.zeros(size, dtype=np.int64)) for size in (1, 0))
    return Microbatch(tokens_T=one, positions_T=one, lengths=(1,), rows_N=none, labels_N=none, targets=(0,), index=index, idle=True)


def undivided(table: ExampleTable, layout: Layout) -> tuple[list[range], list[int], list[int]]:
    """What is not divided: the numbers of its examples, the tokens that they share, and how many tokens a pass computes for them."""
    if not layout.whole_rows:
        return [range(number, number + 1) for number in range(len(table))], [0] * len(table), table.lengths.tolist()
    borders = table.firsts.tolist()
    rows = [range(begin, end) for begin, end in pairwise(borders) if begin < end]
    shared, lengths = [], []
    for row in rows:
        begin, end = int(table.offsets[row.start]), int(table.offsets[row.stop])
        own = table.lengths[row.start : row.stop].tolist()
        shared.append(common_prefix(table.tokens[begin:end], own) if layout.shares and len(row) > 1 else 0)
        lengths.append(end - begin - shared[-1] * (len(row) - 1))
    return rows, shared, lengths


def common_prefix(tokens: NDArray[np.int32], lengths: Sequence[int]) -> int:
    """Number of equal tokens at the beginning of documents that lie end to end, at most the length of the shortest minus 1."""
    common, first, start = min(lengths) - 1, tokens, lengths[0]
    for length in lengths[1:]:
        different = np.flatnonzero(tokens[start : start + common] != first[:common])
        common = int(different[0]) if len(different) else common
        start += length
    return common
