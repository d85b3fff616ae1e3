"""The back end for CUDA devices."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.backend import B, Scoring
from llamahome.model.backends.documents import Documents
from llamahome.model.backends.reference import Reference, plain_bytes, reference_attention


class CudaBackend(Reference):
    """Attention by torch's kernels, one call per document."""

    name = "cuda"
    micro_batch_tokens = 16_384
    memory_gbps = 1000.0
    pass_tokens_per_answer_token = 1000.0
    """An estimate: a pass of one token takes as long as its kernels take to launch, about 25 ms."""

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """By torch's kernels, or as the reference where scores are capped or dropped."""
        if scoring.softcap is not None or scoring.dropout:
            return reference_attention(q_THE, k_TKE, v_TKE, documents, scoring)
        parts, start = [], 0
        for length in documents.lengths:
            q, k, v = (x[start : start + length].transpose(0, 1).unsqueeze(0) for x in (q_THE, k_TKE, v_TKE))
            mask = None
            if scoring.window is not None and length > scoring.window:
                place = torch.arange(length, device=q.device)
                mask = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - scoring.window)
            parts.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scoring.scale, enable_gqa=True)
            )
            start += length
        return torch.cat(parts, 2).squeeze(0).transpose(0, 1)

    def deliver(self, batch: B, /) -> B:
        """`batch` on the device, through pinned memory."""
        names = ("tokens_T", "positions_T", "rows_N", "labels_N")
        there = {name: getattr(batch, name).pin_memory().to(self.device, non_blocking=True) for name in names}
        delivered: B = replace(batch, **there)  # type: ignore[type-var]
        return delivered

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """torch's kernels make the probabilities again."""
        return plain_bytes(model.config.get_text_config(), tokens, precision=self.precision, keys=0)

    def free_bytes(self, local_size: int) -> int | None:
        """Of this process's own device; processes of one machine have one each."""
        return int(torch.cuda.mem_get_info(self.device)[0])
