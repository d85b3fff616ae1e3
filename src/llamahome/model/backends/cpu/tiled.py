"""Attention in tiles that keeps no probabilities: the kernels of attention.cpp as an autograd function.

It supports head sizes that are multiples of 16, in float32 and, on processors with AVX512_BF16, in bfloat16. It keeps its inputs, its
result and one number per query and head; the backward pass recomputes the scores. Documents are not padded, grouped heads read the same
keys, and tokens that all documents share are read in place.

Legend: T tokens, H query heads, K key heads, E head size (that of v may differ).
"""

from typing import Any

import torch
from torch import Tensor

from llamahome.model.backends.backend import Documents
from llamahome.model.backends.cpu.native import Kernels, expects_bf16_pairs, has_compiler

_HEAD_SIZE_UNIT = 16
"""Head sizes must be multiples of it: the number of float32 in the widest vector."""
_NO_WINDOW = 1 << 30
_SEGMENT_KEYS = {torch.float32: 256, torch.bfloat16: 512}
"""Of formats.h."""
_MAX_SEGMENTS, _MOST_PARTIAL_BYTES, _TASKS_PER_THREAD = 16, 1 << 25, 4
"""Of attention_backward.cpp."""


def can_tile(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, kernels: Kernels) -> bool:
    """Whether `tiled_attention` supports these tensors on this machine."""
    if not kernels.has("attention_forward", v_TKE.dtype):
        return False
    supported = all(x.device.type == "cpu" and x.dtype == v_TKE.dtype and x.shape[2] % _HEAD_SIZE_UNIT == 0 for x in (q_THE, k_TKE, v_TKE))
    return supported and len(q_THE) > 0


def will_tile(config: Any, compute: torch.dtype) -> bool:
    """Whether a model with this text config will use `tiled_attention` on this machine; compiles nothing."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_available = {torch.float32: has_compiler, torch.bfloat16: expects_bf16_pairs}.get(compute)
    return is_available is not None and is_available() and size % _HEAD_SIZE_UNIT == 0


def partial_bytes(config: Any, compute: torch.dtype, tokens: int, *, longest: int) -> int:
    """Bytes of the partial gradients of queries that attention_backward.cpp holds, in a pass of documents of `longest` tokens."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window, keys = getattr(config, "sliding_window", None) or _NO_WINDOW, _SEGMENT_KEYS[compute]
    segments = min(_MAX_SEGMENTS, -(-longest // keys))
    if segments < 2:
        return 0
    step = -(-longest // segments)
    rows = sum(min(longest - first, step + window) for first in range(0, longest, step)) * tokens // longest
    whole = 4 * rows * config.num_attention_heads * size
    if whole <= _MOST_PARTIAL_BYTES:
        return int(whole)
    at_once = min(config.num_key_value_heads, -(-_TASKS_PER_THREAD * torch.get_num_threads() * longest // (segments * tokens)))
    return int(whole * max(1, at_once) // config.num_key_value_heads)


def tiled_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, *, scale: float, window: int | None, kernels: Kernels
) -> Tensor:
    """Causal attention inside each document, [T, H, E of v]. Requires `can_tile`; rows of q, k and v may be strided."""
    result: Tensor = _TiledAttention.apply(q_THE, k_TKE, v_TKE, documents, scale, window, kernels)  # type: ignore[no-untyped-call]
    return result


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scale: float, window: int | None, kernels: Kernels
    ) -> Tensor:
        q, k, v = (_contiguous_heads(x) for x in (q_THE, k_TKE, v_TKE))
        out, logs = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)
        plan = _plan(q, k, v, documents, window)
        kernels("attention_forward", (q.dtype,), q, k, v, out, logs, plan, scale)
        ctx.save_for_backward(q, k, v, out, logs, plan)
        ctx.scale, ctx.kernels = scale, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logs, plan = ctx.saved_tensors
        grad = gradients[0].contiguous()
        grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
        ctx.kernels("attention_backward", (q.dtype,), grad, q, k, v, out, logs, grad_q, grad_k, grad_v, plan, ctx.scale)
        return grad_q, grad_k, grad_v, None, None, None, None


def _contiguous_heads(x_THE: Tensor) -> Tensor:
    """x with contiguous heads for each token; copied only if necessary."""
    return x_THE if x_THE.stride()[1:] == (x_THE.shape[2], 1) else x_THE.contiguous()


def _plan(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, window: int | None) -> Tensor:
    """The struct `Plan` of attention.h."""
    strides = (q_THE.stride(0), k_TKE.stride(0), v_TKE.stride(0))
    sizes = (q_THE.shape[1], k_TKE.shape[1], q_THE.shape[2], v_TKE.shape[2])
    visible = min(window or _NO_WINDOW, _NO_WINDOW)
    return torch.tensor([*strides, *sizes, visible, documents.shared, len(documents.lengths), *documents.lengths], dtype=torch.int64)
