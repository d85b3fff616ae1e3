"""What stands in for torch's varlen_attn where there is no GPU: the same signature, one masked product per document."""

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
        place = torch.arange(end - start)
        seen = place[None, :] <= place[:, None]
        if window_size[0] >= 0:
            seen &= place[None, :] >= place[:, None] - window_size[0]
        assert window_size[1] == 0
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


def stand_in(monkeypatch: pytest.MonkeyPatch, *, compiler: str = "aot_eager") -> None:
    """Use it, also for float32, in this test. `compiler` "aot_eager" traces the same graphs and differentiates them, without C++."""
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen_attn)
    monkeypatch.setattr(attention, "VARLEN_TYPES", {torch.float32, torch.bfloat16})
    monkeypatch.setattr(attention, "VARLEN_DEVICES", {"cpu"})
    monkeypatch.setattr(layers, "COMPILER", compiler)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # torch hides it, but not where warnings are errors
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # the compiler uses parts of torch that torch deprecates
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
