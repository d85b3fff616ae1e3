"""A substitute for torch's varlen_attn on machines without a GPU: the same signature, one masked product per document."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from llamahome.model.backends.cuda import attention, layers


def plain_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert cu_seq_q.dtype == torch.int32 and cu_seq_k is cu_seq_q and max_k == max_q
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert return_aux is seqused_k is block_table is num_splits is None
    bounds = cu_seq_q.tolist()
    assert bounds[-1] == len(query), "tokens behind the last boundary would get NaN gradients"
    parts = []
    for start, end in itertools.pairwise(bounds):
        assert 0 < end - start <= max_q
        position = torch.arange(end - start)
        visible = position[None, :] <= position[:, None]
        if window_size[0] >= 0:
            visible &= position[None, :] >= position[:, None] - window_size[0]
        assert window_size[1] == 0
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=enable_gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def use_plain_varlen(monkeypatch: pytest.MonkeyPatch, *, compiler: str = "aot_eager") -> None:
    """Use the substitute in this test, also for float32. `compiler` "aot_eager" traces and differentiates the graphs without C++."""
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen_attn)
    monkeypatch.setattr(attention, "VARLEN_TYPES", {torch.float32, torch.bfloat16})
    monkeypatch.setattr(attention, "VARLEN_DEVICES", {"cpu"})
    monkeypatch.setattr(layers, "COMPILER", compiler)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # torch hides it, but not if warnings are errors
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # the compiler uses deprecated parts of torch
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
