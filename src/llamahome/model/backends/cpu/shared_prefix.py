"""Computes the tokens that all documents of a micro-batch begin with, such as a system prompt, only once.

In a causal decoder the state of a token depends only on the tokens up to it, so equal prefixes have equal states, and their gradient is the
sum over all documents. The loss and its gradients stay the same but for rounding. Not used with dropout, where the copies of a token
differ, nor by back ends whose attention needs every document in full.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MIN_SAVED_SHARE = 0.02
"""Share of the tokens that must be saved; below it, copying costs as much as it saves."""


@dataclass(frozen=True)
class PrefixedPass:
    """The C tokens that are computed, first the shared ones, then the own tokens of each document; N targets."""

    tokens_C: Tensor
    positions_C: Tensor
    rows_N: Tensor
    """Index of the state that predicts each target; several documents may use the same state of a shared token."""
    shared: int
    """Number of shared tokens; 0 if the micro-batch is unchanged."""


def common_prefix(tokens_T: Tensor, lengths: tuple[int, ...]) -> int:
    """Number of equal tokens at the beginning of all documents, at most the length of the shortest minus 1."""
    common, tokens = min(lengths) - 1, tokens_T.numpy()  # numpy, because a training step reads no value of a torch tensor
    first, start = tokens[:common], lengths[0]
    for length in lengths[1:]:
        different = np.flatnonzero(tokens[start : start + common] != first[:common])
        common = int(different[0]) if len(different) else common
        start += length
    return common


def share_prefix(tokens_T: Tensor, positions_T: Tensor, rows_N: Tensor, lengths: tuple[int, ...]) -> PrefixedPass:
    """A micro-batch without repeated prefixes; tokens on the processor."""
    shared = common_prefix(tokens_T, lengths) if len(lengths) > 1 else 0
    if shared * (len(lengths) - 1) < _MIN_SAVED_SHARE * len(tokens_T):
        return PrefixedPass(tokens_T, positions_T, rows_N, 0)
    keep = positions_T >= shared
    keep[:shared] = True
    kept = keep.nonzero().squeeze(1)
    new_index_T = torch.where(keep, keep.cumsum(0) - 1, positions_T)
    return PrefixedPass(tokens_T[kept], positions_T[kept], new_index_T[rows_N], shared)
