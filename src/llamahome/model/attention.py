"""Attention inside documents that lie end to end in one micro-batch: no token sees a neighbour's document.

Back ends with one contract (tests/contracts/test_attention.py): `reference` is one masked product over everything, the yardstick;
`sdpa` calls torch once per document; `blocks` is ours for processors. Where the compiled passes know the processor's products of
bfloat16, `blocks` goes through cpu/tiled.py, which is faster at all lengths and keeps no probabilities; what follows is for float32
and other processors.

`blocks` sorts documents into groups of similar length and multiplies a block of queries with only the keys at or below it, so it does
no work above the diagonal beyond one block and needs no dense mask. Memory: the probabilities, 2 bytes * heads * tokens * mean length
/ 2 per layer in bf16. Measured on two cores in bf16, 9 heads of 64, forward and backward of 2,048 tokens (docs/log.md): documents of
205 tokens 14 ms against 42 ms for torch's kernel in a loop, 512 tokens 13 against 59, 2,048 tokens 52 against 113; in tiles half of that.

Legend: T tokens, H query heads, K key heads, G = H / K, E head size (that of v may differ), N documents of a group, L their padded
length, B queries of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.tiled import can_tile, tiled_attention
from llamahome.model.backends.documents import Documents, Group, from_group, shared_sum, to_group

QUERY_BLOCK = 128
"""measured: 64, 128, 256 and 512 at lengths 100 to 2,048; 128 is first or within 5 % everywhere."""
_NO_WINDOW = 1 << 60


@dataclass(frozen=True)
class Scoring:
    """What a layer does with its scores; cap and dropout are the reference's alone, the compiled passes those of `blocks`."""

    scale: float
    window: int | None
    softcap: float | None = None
    dropout: float = 0.0
    kernels: Kernels | None = None


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


def _attend(q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> tuple[Tensor, list[Tensor]]:
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


def _scaled(x: Tensor, how: Scoring) -> Tensor:
    """Compiled passes scale the scores; without them the queries and their gradient are scaled, which are fewer numbers."""
    return x if how.kernels is not None else x * how.scale


def _queries(q: Tensor, block: slice, how: Scoring) -> Tensor:
    part = _scaled(q[:, :, :, block], how)
    return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[4])


def _probabilities(scores: Tensor, block: slice, keys: slice, how: Scoring) -> Tensor:
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


def _of_scores(grad: Tensor, probabilities: Tensor, how: Scoring) -> Tensor:
    """From the gradient of the probabilities, whose array it takes, to that of the scores."""
    if how.kernels is not None:
        keys = grad.shape[-1]
        how.kernels("softmax_backward", (grad.dtype,), grad, probabilities, grad.numel() // keys, keys, how.scale)
        return grad
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def _attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], how: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
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
    def forward(ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, how: Scoring) -> Tensor:
        out = q_THE.new_empty(*q_THE.shape[:2], v_TKE.shape[2])
        kept: list[Tensor] = []
        for group in documents.groups:
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
        for group in ctx.documents.groups:
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
    how = Scoring(scale, window, kernels=kernels)
    result: Tensor = _BlockAttention.apply(q_THE, k_TKE, v_TKE, documents, how)  # type: ignore[no-untyped-call]
    return result


def sdpa_attention(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, *, scale: float, window: int | None) -> Tensor:
    """The same through torch's kernel, one call per document."""
    parts, start = [], 0
    for length in documents.lengths:
        q, k, v = (x[start : start + length].transpose(0, 1).unsqueeze(0) for x in (q_THE, k_TKE, v_TKE))
        mask = None
        if window is not None and length > window:
            mask = ~_hidden(slice(0, length), slice(0, length), window, q_THE.device)
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True))
        start += length
    return torch.cat(parts, 2).squeeze(0).transpose(0, 1)


def reference_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same as one masked product over all tokens: T * T memory, for checking and for models with capped scores or dropout."""
    tokens, heads = q_THE.shape[:2]
    owner = torch.repeat_interleave(torch.tensor(documents.lengths, device=q_THE.device))
    everything = slice(0, tokens)
    hidden = _hidden(everything, everything, window, q_THE.device) | (owner[:, None] != owner[None, :])
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_TKE, v_TKE))
    scores = torch.einsum("qhe,khe->hqk", q_THE, k).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    probabilities = F.dropout(torch.softmax(scores.masked_fill(hidden, float("-inf")), -1), dropout).to(v.dtype)
    return torch.einsum("hqk,khe->qhe", probabilities, v)


def _documents_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The form transformers calls: query [1, H, T, E] -> [1, T, H, E]; `options` are its own and our `documents`, `backend`, `compiled`."""
    if attention_mask is not None or options.get("s_aux") is not None:
        raise ValueError("its attention has a mask or sinks of its own")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    scoring = Scoring(
        scale=options.get("scaling") or q.shape[-1] ** -0.5,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        dropout=options.get("dropout", 0.0) if module.training else 0.0,
        kernels=options["compiled"],
    )
    return attend_documents(q, k, v, options["documents"], scoring, backend=options["backend"]).unsqueeze(0), None


def attend_documents(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, *, backend: str) -> Tensor:
    """Attention inside documents by the back end of that name, [T, H, E of v]."""
    scale, window = scoring.scale, scoring.window
    if backend == "reference":
        capped, dropout = scoring.softcap, scoring.dropout
        return reference_attention(q_THE, k_TKE, v_TKE, documents, scale=scale, window=window, softcap=capped, dropout=dropout)
    if backend == "blocks":
        q_THE, k_TKE = q_THE.to(v_TKE.dtype), k_TKE.to(v_TKE.dtype)  # under autocast rotation leaves them in float32
        if scoring.kernels is not None and can_tile(q_THE, k_TKE, v_TKE, scoring.kernels):
            return tiled_attention(q_THE, k_TKE, v_TKE, documents, scale=scale, window=window, kernels=scoring.kernels)
        return block_attention(q_THE, k_TKE, v_TKE, documents, scale=scale, window=window, kernels=scoring.kernels)
    return sdpa_attention(q_THE, k_TKE, v_TKE, documents, scale=scale, window=window)


ATTENTION_NAME = "llamahome_documents"
"""What a model's config names while it trains; generation uses torch's own."""


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers; may be called again.

    It has no entry among the mask functions, so transformers builds no mask: the boundaries travel as numbers.
    """
    AttentionInterface.register(ATTENTION_NAME, _documents_forward)
