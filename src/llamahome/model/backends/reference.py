"""The definition: every operation of a back end in plain torch, on any device. The others are tested equal to it.

Attention is one masked product over all tokens of a pass: memory grows with their square.
"""

import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.backend import B, Batch, Pass, Scoring
from llamahome.model.backends.documents import Documents
from llamahome.model.backends.loss import TILE_LOGITS, Head, HeadStats, PlainTiles, head_stats, summed_cross_entropy
from llamahome.model.precision import Precision

_KEPT_PER_HIDDEN, _KEPT_PER_INNER = 18, 8
"""Bytes that one token keeps per layer, per unit of hidden and of feed-forward size. measured on a processor: 22.3 KB a token and layer at
576 and 1,536 in bfloat16 (docs/log.md); 1.6 times that under autocast and 1.8 times in float32."""

_STATES = ("state_size", "mamba_d_state", "ssm_state_size")
_STATES_KEPT = 4
"""An estimate: the state of a token, what it was made from, and the product with it; twice the hidden size is the usual width."""


class Reference:
    """Plain torch."""

    name = "reference"
    micro_batch_tokens = fewest_tokens = 1536
    compiles = False
    compile_costs = ""
    memory_gbps = 8.0
    """measured: a large copy on two cores."""
    pass_tokens_per_answer_token = 100.0
    """measured: 92 and 103 on a processor, in bfloat16 and in float32."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.device, self.precision = device, precision

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """Causal attention inside each document, [T, H, E of v]."""
        return reference_attention(q_THE, k_TKE, v_TKE, documents, scoring)

    def deliver(self, batch: B, /) -> B:
        """`batch` on the device."""
        names = ("tokens_T", "positions_T", "rows_N", "labels_N")
        there = {name: getattr(batch, name).to(self.device) for name in names}
        delivered: B = replace(batch, **there)  # type: ignore[type-var]
        return delivered

    def lay(self, batch: Batch, model: PreTrainedModel, /) -> Pass:
        """All tokens, as they lie."""
        return Pass(batch.tokens_T, batch.positions_T, batch.rows_N, Documents(batch.lengths))

    def loss_sum(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """() float32: sum over targets of -log p(label)."""
        return summed_cross_entropy(hidden_ND, labels_N, head, dtype=self.precision.compute, tiles=self._tiles)

    def _tiles(self, matrix_VD: Tensor, head: Head) -> PlainTiles:
        return PlainTiles(matrix_VD, head)

    def stats(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> HeadStats:
        """Summed loss and number of targets ranked first, without gradients."""
        return head_stats(hidden_ND, labels_N, head, dtype=self.precision.compute)

    def wins_back(self, tokens: float, *, weights: int, processes: int) -> bool:
        """Nothing is compiled, so there is nothing to win back."""
        return True

    def cannot_compile(self) -> str | None:
        """Why nothing is compiled."""
        return "the reference back end is plain torch"

    def compile(self, model: PreTrainedModel) -> int:
        """Nothing."""
        return 0

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """States of every layer, and the probabilities of all tokens with all others."""
        return plain_bytes(model.config.get_text_config(), tokens, precision=self.precision, keys=tokens)

    def tile_bytes(self, vocabulary: int) -> int:
        """Of the loss head's tile of logits, and as much for what is made of it."""
        return 2 * 4 * max(16 * vocabulary, TILE_LOGITS)

    def remarks(self, model: PreTrainedModel) -> list[str]:
        """Nothing: this is as slow as it gets."""
        return []

    def mark(self) -> object:
        """Now."""
        return time.perf_counter()

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """By the wall clock."""
        return float(later - earlier)

    def free_bytes(self, local_size: int) -> int | None:
        """The machine's memory is the device's."""
        return None


def plain_bytes(config: Any, tokens: int, *, precision: Precision, keys: float) -> int:
    """Memory that uncompiled layers keep for the backward pass; attention keeps the probabilities of each token with `keys` others."""
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    low = precision.compute == torch.bfloat16
    probabilities = (getattr(config, "num_attention_heads", None) or 0) * keys * (2 if low else 4)
    width = (1.6 if precision.autocast else 1.0) if low else 1.8
    layer = width * (_KEPT_PER_HIDDEN * hidden + _KEPT_PER_INNER * inner) + probabilities + _state_bytes(config)
    return int(tokens * config.num_hidden_layers * layer)


def _state_bytes(config: Any) -> int:
    """What a layer with a state of its own (Mamba) keeps of each token: in plain torch the whole state, in float32, a few times."""
    size = next((value for name in _STATES if isinstance(value := getattr(config, name, None), int)), 0)
    return _STATES_KEPT * 4 * 2 * int(config.hidden_size) * size


def reference_attention(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring) -> Tensor:
    """Causal attention inside documents as one masked product over all tokens, [T, H, E of v]: T * T memory."""
    device = q_THE.device
    owner = torch.tensor([number for number, length in enumerate(documents.lengths) for _ in range(length)], device=device)
    place = torch.arange(len(owner), device=device)
    unseen = (place[None, :] > place[:, None]) | (owner[:, None] != owner[None, :])
    if scoring.window is not None:
        unseen |= place[None, :] <= place[:, None] - scoring.window
    return attend_masked(q_THE, k_TKE, v_TKE, unseen, scoring)


def attend_masked(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, unseen_TT: Tensor, scoring: Scoring) -> Tensor:
    """One product over all tokens, of which a query does not see the keys that `unseen` says."""
    heads = q_THE.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_TKE, v_TKE))
    scores = torch.einsum("qhe,khe->hqk", q_THE, k).float() * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    probabilities = F.dropout(torch.softmax(scores.masked_fill(unseen_TT, float("-inf")), -1), scoring.dropout).to(v.dtype)
    return torch.einsum("hqk,khe->qhe", probabilities, v)
