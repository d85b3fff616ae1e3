"""Attention of long passes in plain torch: blocks of queries, each computed again in the backward pass, so that no T x T matrix is kept.

A block has as many queries as fit a fixed number of scores, and sees the keys from the start of its first document to its own last token.
Memory: about three arrays of these scores, whatever the length. Cost: one more forward of attention.

Legend: T tokens, H query heads, K key heads, E head size (that of v may differ), Q queries of a block, S keys of a block.
"""

import bisect
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llamahome.model.backends.backend import Documents, Scoring

MOST_WHOLE_TOKENS = 2048
"""Passes of more tokens are computed in blocks; below, one product over all tokens is faster and small."""
SCORES = 2**24
"""Scores of a block: 64 MB in float32."""
BLOCK_BYTES = 3 * 4 * SCORES
"""measured: 174 MiB beside the layer, at 4,608 tokens and 8 heads in bfloat16."""
_FEWEST_QUERIES = 16


def attend_masked(q_QHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, hidden_QS: Tensor, scoring: Scoring) -> Tensor:
    """Attention of queries to keys as one product, [Q, H, E of v]; `hidden` is True for keys that a query may not see."""
    heads = q_QHE.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_SKE, v_SKE))
    scores = torch.einsum("qhe,khe->hqk", q_QHE, k).float() * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    probabilities = F.dropout(torch.softmax(scores.masked_fill(hidden_QS, float("-inf")), -1), scoring.dropout).to(v.dtype)
    return torch.einsum("hqk,khe->qhe", probabilities, v)


def attend_in_blocks(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, *, most_scores: int = SCORES
) -> Tensor:
    """Causal attention inside documents, which share no tokens, in blocks of at most `most_scores` scores, [T, H, E of v]."""
    starts = list(itertools.accumulate(documents.lengths, initial=0))
    tokens, heads = q_THE.shape[:2]
    queries = max(_FEWEST_QUERIES, most_scores // (heads * tokens))
    parts = []
    for first in range(0, tokens, queries):
        end = min(tokens, first + queries)
        begin = starts[bisect.bisect_right(starts, first) - 1]
        if scoring.window is not None:
            begin = max(begin, first - scoring.window + 1)
        hidden = _hidden(starts, first, end, begin, scoring.window, q_THE.device)
        block = q_THE[first:end], k_TKE[begin:end], v_TKE[begin:end], hidden, scoring
        parts.append(checkpoint(attend_masked, *block, use_reentrant=False, preserve_rng_state=scoring.dropout > 0))
    return torch.cat(parts)


def _hidden(starts: list[int], first: int, end: int, begin: int, window: int | None, device: torch.device) -> Tensor:
    """bool [Q, S]: True for keys `begin` to `end` that a query of `first` to `end` may not see."""
    borders = torch.tensor(starts, device=device)
    query, key = torch.arange(first, end, device=device)[:, None], torch.arange(begin, end, device=device)[None, :]
    start = borders[torch.searchsorted(borders, query, right=True) - 1]
    hidden = (key > query) | (key < start)
    return hidden if window is None else hidden | (key <= query - window)
