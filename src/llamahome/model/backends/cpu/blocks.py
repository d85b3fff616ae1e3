"""Attention inside documents in blocks of plain torch, for machines and types that have no compiled tiles (tiled.py).

Documents are sorted into groups of similar length and a block of queries is multiplied with only the keys at or below it, so there is no
work above the diagonal beyond one block and no dense mask. Memory: the probabilities, 2 bytes * heads * tokens * mean length / 2 per
layer in bf16. Measured on two cores in bf16, 9 heads of 64, forward and backward of 2,048 tokens (docs/log.md): documents of 205 tokens
14 ms against 42 ms for torch's kernel in a loop, 512 tokens 13 against 59, 2,048 tokens 52 against 113.

Legend: T tokens, H query heads, K key heads, G = H / K, E head size (that of v may differ), N documents of a group, L their padded
length, B queries of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamahome.model.backends.cpu.groups import Group, from_group, plan_groups, shared_sum, to_group
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.documents import Documents

QUERY_BLOCK = 128
"""measured: 64, 128, 256 and 512 at lengths 100 to 2,048; 128 is first or within 5 % everywhere."""
_NO_WINDOW = 1 << 60


@dataclass(frozen=True)
class _How:
    """What a layer does with its scores, and the compiled passes for it."""

    scale: float
    window: int | None
    kernels: Kernels | None


def _hidden(block: slice, keys: slice, window: int | None, device: torch.device) -> Tensor:
    """bool [B, keys]: what a query of `block` may not see."""
    rows = torch.arange(block.start, block.stop, device=device)[:, None]
    columns = torch.arange(keys.start, keys.stop, device=device)[None, :]
    hidden = columns > rows
    return hidden if window is None else hidden | (columns <= rows - window)


def _blocks(longest: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the range of keys that any of them may see."""
    spans = []
    for begin in range(0, longest, QUERY_BLOCK):
        end = min(longest, begin + QUERY_BLOCK)
        spans.append((slice(begin, end), slice(0 if window is None else max(0, begin - window + 1), end)))
    return spans


def _attend(q: Tensor, k: Tensor, v: Tensor, how: _How) -> tuple[Tensor, list[Tensor]]:
    """Result [N, K, G, L, E of v] from q [N, K, G, L, E], k and v [N * K, L, E], and each block's probabilities for the backward pass."""
    count, key_heads, share, longest = q.shape[:4]
    out = q.new_empty(count, key_heads, share, longest, v.shape[2])
    kept = []
    for block, keys in _blocks(longest, how.window):
        wide = block.stop - block.start
        scores = torch.bmm(_queries(q, block, how), k[:, keys].transpose(1, 2))
        probabilities = _probabilities(scores, block, keys, how)
        out[:, :, :, block] = torch.bmm(probabilities, v[:, keys]).view(count, key_heads, share, wide, -1)
        kept.append(probabilities)
    return out, kept


def _scaled(x: Tensor, how: _How) -> Tensor:
    """Compiled passes scale the scores; without them the queries and their gradient are scaled, which are fewer numbers."""
    return x if how.kernels is not None else x * how.scale


def _queries(q: Tensor, block: slice, how: _How) -> Tensor:
    part = _scaled(q[:, :, :, block], how)
    return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[4])


def _probabilities(scores: Tensor, block: slice, keys: slice, how: _How) -> Tensor:
    """Softmax of scores [N * K, G * B, keys] over what each query may see; takes the array of `scores`."""
    wide, span = block.stop - block.start, keys.stop - keys.start
    if how.kernels is not None:
        window = _NO_WINDOW if how.window is None else how.window
        first = block.start - keys.start + 1
        how.kernels("causal_softmax", (scores.dtype,), scores, scores.numel() // span, span, wide, first, window, how.scale)
        return scores
    by_head = scores.view(scores.shape[0], -1, wide, span)
    if how.window is None:  # only the last square lies on the diagonal
        by_head[..., block].masked_fill_(_hidden(block, block, None, scores.device), float("-inf"))
    else:
        by_head.masked_fill_(_hidden(block, keys, how.window, scores.device), float("-inf"))
    return torch.softmax(scores, -1)


def _of_scores(grad: Tensor, probabilities: Tensor, how: _How) -> Tensor:
    """From the gradient of the probabilities, whose array it takes, to that of the scores."""
    if how.kernels is not None:
        keys = grad.shape[-1]
        how.kernels("softmax_backward", (grad.dtype,), grad, probabilities, grad.numel() // keys, keys, how.scale)
        return grad
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def _attend_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], how: _How) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend` in the shapes of q, k and v."""
    count, key_heads, share, longest, size = q.shape
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for probabilities, (block, keys) in zip(kept, _blocks(longest, how.window), strict=True):
        wide = block.stop - block.start
        grad = grad_out[:, :, :, block].reshape(-1, share * wide, v.shape[2])
        queries = _queries(q, block, how)
        grad_v[:, keys] += torch.bmm(probabilities.transpose(1, 2), grad)
        grad_p = torch.bmm(grad, v[:, keys].transpose(1, 2))
        grad_s = _of_scores(grad_p, probabilities, how)
        grad_q[:, :, :, block] = _scaled(torch.bmm(grad_s, k[:, keys]), how).view(count, key_heads, share, wide, size)
        grad_k[:, keys] += torch.bmm(grad_s.transpose(1, 2), queries)
    return grad_q, grad_k, grad_v


class _BlockAttention(torch.autograd.Function):
    """Result [T, H, E] from q [T, H, E], k and v [T, K, E], group by group."""

    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, how: _How) -> Tensor:
        out = q_THE.new_empty(*q_THE.shape[:2], v_TKE.shape[2])
        kept: list[Tensor] = []
        for group in plan_groups(documents.lengths, documents.shared):
            part, probabilities = _attend(*_spread(q_THE, k_TKE, v_TKE, group), how)
            from_group(out, part, group)
            kept += probabilities
        ctx.save_for_backward(q_THE, k_TKE, v_TKE, *kept)
        ctx.documents, ctx.how = documents, how
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_THE, k_TKE, v_TKE, *kept = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THE, k_TKE, v_TKE))
        used, shared = 0, [torch.zeros(x[: ctx.documents.shared].shape, device=x.device) for x in (k_TKE, v_TKE)]
        for group in plan_groups(ctx.documents.lengths, ctx.documents.shared):
            grad = to_group(gradients[0], group, k_TKE.shape[1])
            if group.silent is not None:
                grad = grad.masked_fill(group.silent[:, None, None, :, None], 0)
            q, k, v = _spread(q_THE, k_TKE, v_TKE, group)
            blocks = len(_blocks(group.longest, ctx.how.window))
            of_q, of_k, of_v = _attend_backward(grad, q, k, v, kept[used : used + blocks], ctx.how)
            used += blocks
            from_group(grad_q, of_q, group)
            for target, part, common in ((grad_k, of_k, shared[0]), (grad_v, of_v, shared[1])):
                laid = part.view(len(group.lengths), -1, 1, group.longest, part.shape[2])
                from_group(target, laid, group)
                common += shared_sum(laid, group)
        for target, common in ((grad_k, shared[0]), (grad_v, shared[1])):
            target[: ctx.documents.shared] = common
        return grad_q, grad_k, grad_v, None, None


def _spread(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    key_heads = k_TKE.shape[1]
    k, v = (to_group(x, group, key_heads).reshape(-1, group.longest, x.shape[2]) for x in (k_TKE, v_TKE))
    return to_group(q_THE, group, key_heads), k, v


def block_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, *, scale: float, window: int | None, kernels: Kernels | None = None
) -> Tensor:
    """Causal attention inside each document, [T, H, E]; `window` is how many tokens back one may look, itself included."""
    q_THE, k_TKE = q_THE.to(v_TKE.dtype), k_TKE.to(v_TKE.dtype)  # under autocast rotation leaves them in float32
    how = _How(scale, window, kernels)
    result: Tensor = _BlockAttention.apply(q_THE, k_TKE, v_TKE, documents, how)  # type: ignore[no-untyped-call]
    return result
