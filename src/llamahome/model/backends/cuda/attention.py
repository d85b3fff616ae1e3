"""Attention over all documents of a pass at once: torch's varlen_attn (FlashAttention), a masked product for what it does not take.

scaled_dot_product_attention is never called per document: torch then takes cuDNN's, which plans anew for each length (measured on an
H100: 1 to 3.5 seconds a step even for a model of two layers).

Legend: T tokens, H query heads, K key heads, E head size (that of v may differ).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from llamahome.model.backends.backend import Scoring
from llamahome.model.backends.cuda.passes import Packed
from llamahome.model.backends.reference import attend_masked

VARLEN_DEVICES = {"cuda", "meta"}
VARLEN_TYPES = {torch.bfloat16, torch.float16}
_LARGEST_HEAD, _GAP = 256, range(193, 225)
"""Head sizes are multiples of 8 up to 256; torch refuses the backward pass of those in the gap on some GPUs (sm86, sm89, sm120):
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp."""


def attend_documents(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Packed, scoring: Scoring) -> Tensor:
    """[T, H, E of v]; what torch has no kernel for is computed as the reference does."""
    if scoring.softcap is not None or scoring.dropout:
        return attend_masked(q_THE, k_TKE, v_TKE, _unseen(documents, scoring.window, q_THE), scoring)
    if v_TKE.device.type not in VARLEN_DEVICES or why_masked(q_THE.shape[-1], v_TKE.shape[-1], v_TKE.dtype) is not None:
        return _masked(q_THE, k_TKE, v_TKE, ~_unseen(documents, scoring.window, q_THE), scoring.scale)
    back = -1 if scoring.window is None else scoring.window - 1
    grouped = q_THE.shape[1] != k_TKE.shape[1]
    found: Any = varlen_attn(
        q_THE.contiguous(),
        k_TKE.contiguous(),
        v_TKE.contiguous(),
        documents.boundaries,
        documents.boundaries,
        documents.longest,
        documents.longest,
        scale=scoring.scale,
        window_size=(back, 0),
        enable_gqa=grouped,
    )
    result: Tensor = found
    return result


def why_masked(size: int, size_v: int, dtype: torch.dtype) -> str | None:
    """Why varlen_attn does not take heads of this size and type; None when it does."""
    if dtype not in VARLEN_TYPES:
        return f"products are {str(dtype).removeprefix('torch.')}"
    if size != size_v:
        return f"values of {size_v} are not as wide as keys of {size}"
    if size % 8 or size > _LARGEST_HEAD or size in _GAP:
        return f"heads have a size of {size}"
    return None


def _masked(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, seen_TT: Tensor, scale: float) -> Tensor:
    """All tokens with all others. Groups of heads are written out: the kernel that keeps no probabilities knows none."""
    heads = q_THE.shape[1]
    q, k, v = (x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)[None] for x in (q_THE, k_TKE, v_TKE))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TT, scale=scale)[0].transpose(0, 1)


def _unseen(documents: Packed, window: int | None, like: Tensor) -> Tensor:
    """bool [T, T]: what a token does not see; made on the device, once per pass and window."""
    found = documents.masks.get(window)
    if found is None:
        place = torch.arange(like.shape[0], dtype=torch.int32, device=like.device)
        owner = torch.bucketize(place, documents.boundaries[1:], right=True)
        found = (place[None, :] > place[:, None]) | (owner[:, None] != owner[None, :])
        if window is not None:
            found |= place[None, :] <= place[:, None] - window
        documents.masks[window] = found
    return found
