"""Attention inside documents in blocks of plain torch, for machines and dtypes without tiled kernels (tiled.py).

Documents are sorted into groups of similar length and padded at their ends. A block of queries is multiplied only with the keys up to its
last query, so at most one block beyond the diagonal is computed and no dense mask is needed. Memory: the probabilities, 2 bytes * heads *
tokens * mean length / 2 per layer in bf16; those of documents beyond LONGEST_KEPT are computed again in the backward pass. Measured on two
cores in bf16, 9 heads of 64, forward and backward of 2,048 tokens (docs/log.md): documents of 205 tokens 14 ms against 42 ms for torch's
kernel in a loop, 512 tokens 13 against 59, 2,048 tokens 52 against 113.

Legend: T tokens, H query heads, K key heads, G = H / K, E head size (that of v may differ), N documents of a group, L their padded length,
B queries of a block.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamahome.model.backends.backend import Documents
from llamahome.model.backends.cpu.native import Kernels

QUERY_BLOCK = 128
"""measured: 64, 128, 256 and 512 at lengths 100 to 2,048; 128 is fastest or within 5 % everywhere."""
LONGEST_KEPT = 4096
"""Tokens of the longest document whose probabilities are kept; more would take gigabytes in a layer."""
_MAX_PADDING = 0.25
"""Padding of a group as a share of its tokens: an extra group costs about 30 small calls per layer."""
_NO_WINDOW = 1 << 60


@dataclass(frozen=True)
class DocumentGroup:
    """Consecutive documents of one micro-batch that are attended together, padded at their ends to the longest.

    Tokens are numbered as in the pass: first the tokens that all documents share, then the own tokens of each document.
    """

    start: int
    """First own token of the documents."""
    tokens: int
    """Number of own tokens of all documents together."""
    lengths: tuple[int, ...]
    """Tokens of each document, the shared ones included."""
    gather: Tensor | None
    """int64 [N * L]: the token at each padded place; None if the tokens are contiguous without padding."""
    scatter: Tensor | None
    """int64 [tokens]: the padded place of each own token; None like `gather`."""
    unused: Tensor | None
    """bool [N, L]: places whose result is not used: padding, and the shared tokens of all but the first document; None like `gather`."""
    shared: int = 0
    """Number of first tokens that all documents of the micro-batch share."""

    @property
    def longest(self) -> int:
        """L."""
        return self.lengths[0]

    @property
    def is_first(self) -> bool:
        """Whether the group has the first document of the micro-batch, whose results are those of the shared tokens."""
        return self.start == self.shared


@functools.lru_cache(maxsize=64)
def plan_groups(lengths: tuple[int, ...], shared: int = 0) -> tuple[DocumentGroup, ...]:
    """Groups of documents of similar length; `lengths` in the order of the tokens (best sorted from the longest, correct in any order).

    `shared` is the number of first tokens that all documents share, less than the length of the shortest. Cached for the layers of a pass.
    """
    groups: list[DocumentGroup] = []
    start, first = shared, 0
    while first < len(lengths):
        last, total = first + 1, lengths[first]
        while last < len(lengths) and lengths[last] <= lengths[first]:
            padded = lengths[first] * (last + 1 - first)
            if padded > (total + lengths[last]) * (1 + _MAX_PADDING):
                break
            total += lengths[last]
            last += 1
        groups.append(_group(start, lengths[first:last], shared))
        start, first = start + groups[-1].tokens, last
    return tuple(groups)


def _group(start: int, lengths: tuple[int, ...], shared: int) -> DocumentGroup:
    longest, tokens = lengths[0], sum(lengths) - shared * len(lengths)
    if not shared and all(length == longest for length in lengths):
        return DocumentGroup(start, tokens, lengths, None, None, None)
    places = torch.arange(longest)[None, :]
    own = (places < torch.tensor(lengths)[:, None]) & (places >= shared)
    scatter = own.flatten().nonzero().squeeze(1)
    gather = torch.zeros(len(lengths), longest, dtype=torch.int64)
    gather[:, :shared] = torch.arange(shared)
    gather = gather.flatten().index_put((scatter,), torch.arange(start, start + tokens))
    unused = ~own
    if start == shared:
        unused[0, :shared] = False
    return DocumentGroup(start, tokens, lengths, gather, scatter, unused, shared)


def _to_group(x_THE: Tensor, group: DocumentGroup, key_heads: int) -> Tensor:
    """The tokens of a group as [N, K, G, L, E]; padded places repeat some token."""
    if group.gather is None:
        part = x_THE[group.start : group.start + group.tokens]
    else:
        part = x_THE.index_select(0, group.gather)
    heads, size = part.shape[1], part.shape[2]
    return part.view(len(group.lengths), group.longest, key_heads, heads // key_heads, size).permute(0, 2, 3, 1, 4)


def _qkv_of(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, group: DocumentGroup) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, K, G, L, E], and k and v [N * K, L, E] of a group."""
    key_heads = k_TKE.shape[1]
    k, v = (_to_group(x, group, key_heads).reshape(-1, group.longest, x.shape[2]) for x in (k_TKE, v_TKE))
    return _to_group(q_THE, group, key_heads), k, v


def _from_group(out_THE: Tensor, x_NKGLE: Tensor, group: DocumentGroup) -> None:
    """Write the result of a group to its tokens; the first document also writes the shared tokens."""
    count, key_heads, share, longest, size = x_NKGLE.shape
    flat = x_NKGLE.permute(0, 3, 1, 2, 4).reshape(count * longest, key_heads * share, size)
    out_THE[group.start : group.start + group.tokens] = flat if group.scatter is None else flat.index_select(0, group.scatter)
    if group.is_first:
        out_THE[: group.shared] = flat[: group.shared]


def _shared_sum(x_NKGLE: Tensor, group: DocumentGroup) -> Tensor:
    """The sum over the documents of a group for each shared token, [shared, K * G, E] float32."""
    summed = x_NKGLE[:, :, :, : group.shared].sum(0, dtype=torch.float32)
    return summed.permute(2, 0, 1, 3).flatten(1, 2)


@dataclass(frozen=True)
class _Options:
    """How a layer computes its scores; without kernels the softmax runs in plain torch."""

    scale: float
    window: int | None
    kernels: Kernels | None


def _hidden_mask(block: slice, keys: slice, window: int | None, device: torch.device) -> Tensor:
    """bool [B, keys]: True for keys that a query of `block` may not see."""
    rows = torch.arange(block.start, block.stop, device=device)[:, None]
    columns = torch.arange(keys.start, keys.stop, device=device)[None, :]
    hidden = columns > rows
    return hidden if window is None else hidden | (columns <= rows - window)


def _blocks(longest: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the range of keys that any of its queries may see."""
    blocks = []
    for begin in range(0, longest, QUERY_BLOCK):
        end = min(longest, begin + QUERY_BLOCK)
        blocks.append((slice(begin, end), slice(0 if window is None else max(0, begin - window + 1), end)))
    return blocks


def _attend(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, list[Tensor]]:
    """Result [N, K, G, L, E of v] from q [N, K, G, L, E], k and v [N * K, L, E], and each block's probabilities if L is short."""
    count, key_heads, share, longest = q.shape[:4]
    out = q.new_empty(count, key_heads, share, longest, v.shape[2])
    kept = []
    for block, keys in _blocks(longest, options.window):
        probabilities = _probabilities(q, k, block, keys, options)
        out[:, :, :, block] = torch.bmm(probabilities, v[:, keys]).view(count, key_heads, share, block.stop - block.start, -1)
        if longest <= LONGEST_KEPT:
            kept.append(probabilities)
    return out, kept


def _probabilities(q: Tensor, k: Tensor, block: slice, keys: slice, options: _Options) -> Tensor:
    """[N * K, G * B, keys]."""
    return _softmax_(torch.bmm(_queries(q, block, options), k[:, keys].transpose(1, 2)), block, keys, options)


def _scaled(x: Tensor, options: _Options) -> Tensor:
    """Queries or their gradient, scaled if there are no kernels, which scale the scores instead; there are fewer queries than scores."""
    return x if options.kernels is not None else x * options.scale


def _queries(q: Tensor, block: slice, options: _Options) -> Tensor:
    part = _scaled(q[:, :, :, block], options)
    return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[4])


def _softmax_(scores: Tensor, block: slice, keys: slice, options: _Options) -> Tensor:
    """Softmax of scores [N * K, G * B, keys] over the keys that each query may see; overwrites `scores`."""
    queries, width = block.stop - block.start, keys.stop - keys.start
    if options.kernels is not None:
        window = _NO_WINDOW if options.window is None else options.window
        first = block.start - keys.start + 1
        sizes = scores.numel() // width, width, queries, first, window
        options.kernels("causal_softmax", (scores.dtype,), scores, *sizes, options.scale)
        return scores
    by_head = scores.view(scores.shape[0], -1, queries, width)
    if options.window is None:  # only the last square of keys crosses the diagonal
        by_head[..., block].masked_fill_(_hidden_mask(block, block, None, scores.device), float("-inf"))
    else:
        by_head.masked_fill_(_hidden_mask(block, keys, options.window, scores.device), float("-inf"))
    return torch.softmax(scores, -1)


def _softmax_backward_(grad: Tensor, probabilities: Tensor, options: _Options) -> Tensor:
    """The gradient of the scores from that of the probabilities, which may be overwritten."""
    if options.kernels is not None:
        keys = grad.shape[-1]
        options.kernels("softmax_backward", (grad.dtype,), grad, probabilities, grad.numel() // keys, keys, options.scale)
        return grad
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def _attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend` in the shapes of q, k and v; probabilities that were not kept are computed again."""
    count, key_heads, share, longest, size = q.shape
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for number, (block, keys) in enumerate(_blocks(longest, options.window)):
        probabilities = kept[number] if kept else _probabilities(q, k, block, keys, options)
        length = block.stop - block.start
        grad = grad_out[:, :, :, block].reshape(-1, share * length, v.shape[2])
        queries = _queries(q, block, options)
        grad_v[:, keys] += torch.bmm(probabilities.transpose(1, 2), grad)
        grad_scores = _softmax_backward_(torch.bmm(grad, v[:, keys].transpose(1, 2)), probabilities, options)
        grad_q[:, :, :, block] = _scaled(torch.bmm(grad_scores, k[:, keys]), options).view(count, key_heads, share, length, size)
        grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), queries)
    return grad_q, grad_k, grad_v


class _BlockAttention(torch.autograd.Function):
    """Result [T, H, E] from q [T, H, E], k and v [T, K, E], group by group."""

    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, options: _Options) -> Tensor:
        out = q_THE.new_empty(*q_THE.shape[:2], v_TKE.shape[2])
        kept: list[Tensor] = []
        for group in plan_groups(documents.lengths, documents.shared):
            part, probabilities = _attend(*_qkv_of(q_THE, k_TKE, v_TKE, group), options)
            _from_group(out, part, group)
            kept += probabilities
        ctx.save_for_backward(q_THE, k_TKE, v_TKE, *kept)
        ctx.documents, ctx.options = documents, options
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_THE, k_TKE, v_TKE, *kept = ctx.saved_tensors
        shared = ctx.documents.shared
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THE, k_TKE, v_TKE))
        done, shared_grads = 0, [torch.zeros(x[:shared].shape, device=x.device) for x in (k_TKE, v_TKE)]
        for group in plan_groups(ctx.documents.lengths, shared):
            grad = _to_group(gradients[0], group, k_TKE.shape[1])
            if group.unused is not None:
                grad = grad.masked_fill(group.unused[:, None, None, :, None], 0)
            q, k, v = _qkv_of(q_THE, k_TKE, v_TKE, group)
            blocks = len(_blocks(group.longest, ctx.options.window)) if group.longest <= LONGEST_KEPT else 0
            group_q, group_k, group_v = _attend_backward(grad, q, k, v, kept[done : done + blocks], ctx.options)
            done += blocks
            _from_group(grad_q, group_q, group)
            for target, part, shared_grad in ((grad_k, group_k, shared_grads[0]), (grad_v, group_v, shared_grads[1])):
                by_document = part.view(len(group.lengths), -1, 1, group.longest, part.shape[2])
                _from_group(target, by_document, group)
                shared_grad += _shared_sum(by_document, group)
        for target, shared_grad in ((grad_k, shared_grads[0]), (grad_v, shared_grads[1])):
            target[:shared] = shared_grad
        return grad_q, grad_k, grad_v, None, None


def block_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, *, scale: float, window: int | None, kernels: Kernels | None = None
) -> Tensor:
    """Causal attention inside each document, [T, H, E of v]; `window` is the number of tokens that a query sees, itself included."""
    q_THE, k_TKE = q_THE.to(v_TKE.dtype), k_TKE.to(v_TKE.dtype)  # under autocast, rotary embeddings leave them in float32
    options = _Options(scale, window, kernels)
    result: Tensor = _BlockAttention.apply(q_THE, k_TKE, v_TKE, documents, options)  # type: ignore[no-untyped-call]
    return result
