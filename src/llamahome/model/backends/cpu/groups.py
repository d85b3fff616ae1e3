"""Which documents of a micro-batch are attended together: groups of similar length, padded at their ends. Arithmetic, once per pass."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_PADDING = 0.25
"""A group may be this much longer than its documents together: an extra group costs about 30 small calls per layer."""


@dataclass(frozen=True)
class Group:
    """Consecutive documents of one micro-batch that are attended together, padded at their ends to the longest.

    Tokens are numbered as they lie in the pass: where all documents begin with the same tokens, these come first and once, then what
    each document has of its own.
    """

    start: int
    """First of the documents' own tokens."""
    tokens: int
    """How many of their own all documents have together."""
    lengths: tuple[int, ...]
    """Of whole documents."""
    spread: Tensor | None
    """int64 [N * L]: which token stands at each padded place; None when the tokens lie as they are needed."""
    gather: Tensor | None
    """int64 [tokens]: the padded place of each own token."""
    silent: Tensor | None
    """bool [N, L]: places whose result nobody reads: padding, and the shared tokens of all documents but the first."""
    shared: int = 0
    """How many first tokens all documents of the micro-batch share."""

    @property
    def longest(self) -> int:
        """L."""
        return self.lengths[0]

    @property
    def leads(self) -> bool:
        """Whether the first document of the micro-batch, which stands for all in the shared tokens, is in this group."""
        return self.start == self.shared


@functools.lru_cache(maxsize=4)
def plan_groups(lengths: tuple[int, ...], shared: int = 0) -> tuple[Group, ...]:
    """Group documents of similar length; `lengths` in the order of the tokens (best longest first, correct in any order).

    Kept for the layers of a pass, which all ask for the same. `shared` first tokens, fewer than the shortest document has, lie once before
    everything else.
    """
    groups: list[Group] = []
    start, first = shared, 0
    while first < len(lengths):
        last, total = first + 1, lengths[first]
        while last < len(lengths) and lengths[last] <= lengths[first]:
            padded = lengths[first] * (last + 1 - first)
            if padded > (total + lengths[last]) * (1 + _MOST_PADDING):
                break
            total += lengths[last]
            last += 1
        groups.append(_group(start, lengths[first:last], shared))
        start, first = start + groups[-1].tokens, last
    return tuple(groups)


def _group(start: int, lengths: tuple[int, ...], shared: int) -> Group:
    longest, tokens = lengths[0], sum(lengths) - shared * len(lengths)
    if not shared and all(length == longest for length in lengths):
        return Group(start, tokens, lengths, None, None, None)
    places = torch.arange(longest)[None, :]
    own = (places < torch.tensor(lengths)[:, None]) & (places >= shared)
    gather = own.flatten().nonzero().squeeze(1)
    spread = torch.zeros(len(lengths), longest, dtype=torch.int64)
    spread[:, :shared] = torch.arange(shared)
    spread = spread.flatten().index_put((gather,), torch.arange(start, start + tokens))
    silent = ~own
    if start == shared:
        silent[0, :shared] = False
    return Group(start, tokens, lengths, spread, gather, silent, shared)


def to_group(x_THE: Tensor, group: Group, key_heads: int) -> Tensor:
    """Tokens of a group as [N, K, G, L, E]; padded places repeat some token."""
    if group.spread is None:
        part = x_THE[group.start : group.start + group.tokens]
    else:
        part = x_THE.index_select(0, group.spread)
    heads, size = part.shape[1], part.shape[2]
    return part.view(len(group.lengths), group.longest, key_heads, heads // key_heads, size).permute(0, 2, 3, 1, 4)


def from_group(out_THE: Tensor, x_NKGLE: Tensor, group: Group) -> None:
    """Write a group's result back to its tokens, to the shared ones from the first document alone."""
    count, key_heads, share, longest, size = x_NKGLE.shape
    flat = x_NKGLE.permute(0, 3, 1, 2, 4).reshape(count * longest, key_heads * share, size)
    out_THE[group.start : group.start + group.tokens] = flat if group.gather is None else flat.index_select(0, group.gather)
    if group.leads:
        out_THE[: group.shared] = flat[: group.shared]


def shared_sum(x_NKGLE: Tensor, group: Group) -> Tensor:
    """What all documents of a group give to the shared tokens, [shared, K * G, E] float32."""
    summed = x_NKGLE[:, :, :, : group.shared].sum(0, dtype=torch.float32)
    return summed.permute(2, 0, 1, 3).flatten(1, 2)
