"""Attention in tiles that keeps no probabilities: the compiled passes of attention.cpp as one autograd function.

For heads whose sizes are multiples of 16, in float32 and, on processors that multiply pairs of it (AVX512_BF16), in bfloat16. It keeps
its inputs, its result and one number per query and head; the backward pass makes the scores again. Documents lie end to end and are never
padded, heads that share keys read the same ones, and tokens that all documents begin with are read where they lie.

Legend: T tokens, H query heads, K key heads, E head size (that of v may differ).
"""

from typing import Any

import torch
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels, expects_pairs, has_compiler
from llamahome.model.backends.documents import Documents

_UNIT = 16
"""Head sizes are multiples of it: as many float32 as the widest vector holds."""
_NO_WINDOW = 1 << 30


def can_tile(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, kernels: Kernels) -> bool:
    """Whether `tiled_attention` takes these tensors on this machine."""
    if not kernels.has("attention_forward", v_TKE.dtype):
        return False
    known = all(x.device.type == "cpu" and x.dtype == v_TKE.dtype and x.shape[2] % _UNIT == 0 for x in (q_THE, k_TKE, v_TKE))
    return known and len(q_THE) > 0


def will_tile(config: Any, compute: torch.dtype) -> bool:
    """Whether compiled passes will attend in tiles on this machine, judged by the text config of a model before anything is compiled."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    able = {torch.float32: has_compiler, torch.bfloat16: expects_pairs}.get(compute)
    return able is not None and able() and size % _UNIT == 0


def tiled_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, *, scale: float, window: int | None, kernels: Kernels
) -> Tensor:
    """Causal attention inside each document, [T, H, E of v], where `can_tile`; rows of q, k and v may lie apart."""
    result: Tensor = _TiledAttention.apply(q_THE, k_TKE, v_TKE, documents, scale, window, kernels)  # type: ignore[no-untyped-call]
    return result


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scale: float, window: int | None, kernels: Kernels
    ) -> Tensor:
        q, k, v = (_by_token(x) for x in (q_THE, k_TKE, v_TKE))
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


def _by_token(x_THE: Tensor) -> Tensor:
    """The heads of a token side by side."""
    return x_THE if x_THE.stride()[1:] == (x_THE.shape[2], 1) else x_THE.contiguous()


def _plan(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, window: int | None) -> Tensor:
    """`Plan` of attention.cpp."""
    steps = (q_THE.stride(0), k_TKE.stride(0), v_TKE.stride(0))
    shape = (q_THE.shape[1], k_TKE.shape[1], q_THE.shape[2], v_TKE.shape[2])
    seen = min(window or _NO_WINDOW, _NO_WINDOW)
    return torch.tensor([*steps, *shape, seen, documents.shared, len(documents.lengths), *documents.lengths], dtype=torch.int64)
