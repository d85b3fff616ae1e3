"""Attention over all documents of a pass at once: torch's varlen_attn (FlashAttention), or a masked product where it has no kernel.

scaled_dot_product_attention is never called per document, because torch then uses cuDNN's kernel, which plans again for each length
(measured on an H100: 1 to 3.5 seconds a step even for a model of two layers).

Legend: T tokens, H query heads, K key heads, E head size (that of v may differ).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from llamahome.model.backends.backend import Scoring
from llamahome.model.backends.cuda.passes import PackedDocuments
from llamahome.model.backends.query_blocks import attend_masked

VARLEN_DEVICES = {"cuda", "meta"}
VARLEN_TYPES = {torch.bfloat16, torch.float16}
_MAX_HEAD_SIZE, _UNSUPPORTED_SIZES = 256, range(193, 225)
"""varlen_attn takes head sizes that are multiples of 8, up to 256. Some GPUs (sm86, sm89, sm120) have no backward pass for the unsupported
sizes: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp."""


def attend_documents(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: PackedDocuments, scoring: Scoring) -> Tensor:
    """[T, H, E of v]; if scores are capped or dropped, computed as the reference does."""
    if scoring.softcap is not None or scoring.dropout:
        return attend_masked(q_THE, k_TKE, v_TKE, _hidden_mask(documents, scoring.window, q_THE), scoring)
    if v_TKE.device.type not in VARLEN_DEVICES or why_masked(q_THE.shape[-1], v_TKE.shape[-1], v_TKE.dtype) is not None:
        return _masked(q_THE, k_TKE, v_TKE, ~_hidden_mask(documents, scoring.window, q_THE), scoring.scale)
    back = -1 if scoring.window is None else scoring.window - 1
    out: Any = varlen_attn(
        q_THE.contiguous(),
        k_TKE.contiguous(),
        v_TKE.contiguous(),
        documents.boundaries,
        documents.boundaries,
        documents.longest,
        documents.longest,
        scale=scoring.scale,
        window_size=(back, 0),
        enable_gqa=q_THE.shape[1] != k_TKE.shape[1],
    )
    result: Tensor = out
    return result


def why_masked(size: int, size_v: int, dtype: torch.dtype) -> str | None:
    """The reason why varlen_attn does not support heads of this size and dtype; None if it does."""
    if dtype not in VARLEN_TYPES:
        return f"products are {str(dtype).removeprefix('torch.')}"
    if size != size_v:
        return f"values of {size_v} are not as wide as keys of {size}"
    if size % 8 or size > _MAX_HEAD_SIZE or size in _UNSUPPORTED_SIZES:
        return f"heads have a size of {size}"
    return None


def _masked(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, visible_TT: Tensor, scale: float) -> Tensor:
    """Attention as one masked product. Key heads are repeated, because the memory-efficient kernel does not support grouped heads."""
    heads = q_THE.shape[1]
    q, k, v = (x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)[None] for x in (q_THE, k_TKE, v_TKE))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible_TT, scale=scale)[0].transpose(0, 1)


def _hidden_mask(documents: PackedDocuments, window: int | None, like: Tensor) -> Tensor:
    """bool [T, T], True for keys that a query may not see; made on the device, once per pass and window."""
    mask = documents.masks.get(window)
    if mask is None:
        position = torch.arange(like.shape[0], dtype=torch.int32, device=like.device)
        document = torch.bucketize(position, documents.boundaries[1:], right=True)
        mask = (position[None, :] > position[:, None]) | (document[:, None] != document[None, :])
        if window is not None:
            mask |= position[None, :] <= position[:, None] - window
        documents.masks[window] = mask
    return mask
