"""Which documents of a micro-batch are attended together: groups of similar length, padded at their ends. Arithmetic, once per pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_PADDING = 0.25
"""A group may be this much longer than its documents together: an extra group costs about 30 small calls per layer."""


@dataclass(frozen=True)
class Group:
    """Consecutive documents of one micro-batch that are attended together, padded at their ends to the longest."""

    start: int
    """First token of the first document."""
    tokens: int
    """Tokens of all documents together."""
    lengths: tuple[int, ...]
    spread: Tensor | None
    """int64 [N * L]: which token (counted from `start`) stands at each padded place; None when nothing is padded."""
    gather: Tensor | None
    """int64 [tokens]: the padded place of each token."""
    padding: Tensor | None
    """bool [N, L]: places that hold no token."""

    @property
    def longest(self) -> int:
        """L."""
        return self.lengths[0]


@dataclass(frozen=True)
class Documents:
    """The document boundaries of a micro-batch, made once and used by every layer."""

    lengths: tuple[int, ...]
    groups: tuple[Group, ...]


def plan_documents(lengths: Sequence[int], *, device: torch.device) -> Documents:
    """Group documents of similar length; `lengths` in the order of the tokens (best longest first, correct in any order)."""
    groups: list[Group] = []
    start, first = 0, 0
    while first < len(lengths):
        last, total = first + 1, lengths[first]
        while last < len(lengths) and lengths[last] <= lengths[first]:
            padded = lengths[first] * (last + 1 - first)
            if padded > (total + lengths[last]) * (1 + _MOST_PADDING):
                break
            total += lengths[last]
            last += 1
        groups.append(_group(start, tuple(lengths[first:last]), device))
        start, first = start + total, last
    return Documents(tuple(lengths), tuple(groups))


def _group(start: int, lengths: tuple[int, ...], device: torch.device) -> Group:
    longest, tokens = lengths[0], sum(lengths)
    if all(length == longest for length in lengths):
        return Group(start, tokens, lengths, None, None, None)
    padding = torch.arange(longest)[None, :] >= torch.tensor(lengths)[:, None]
    gather = (~padding).flatten().nonzero().squeeze(1)  # made on the processor: on a GPU this would wait for all that was asked of it
    spread = torch.zeros(len(lengths) * longest, dtype=torch.int64)
    spread[gather] = torch.arange(tokens)
    return Group(start, tokens, lengths, spread.to(device), gather.to(device), padding.to(device))
