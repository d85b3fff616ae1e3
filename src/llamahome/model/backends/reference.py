"""The reference back end: every operation in plain torch, on any device; the other back ends are tested against it.

Attention is one masked product over all tokens of a pass; of long passes, one for each block of queries (query_blocks.py).
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.backend import TILE_TOKENS, B, Batch, Documents, OffloadStore, Pass, Scoring
from llamahome.model.backends.file_store import file_store
from llamahome.model.backends.groups import share_groups, uses_dropout, visible_in_groups
from llamahome.model.backends.logprobs import target_logprobs
from llamahome.model.backends.loss import TILE_LOGITS, Head, HeadStats, PlainTiles, head_stats, summed_cross_entropy
from llamahome.model.backends.query_blocks import BLOCK_BYTES, MOST_WHOLE_TOKENS, attend_in_blocks, attend_masked
from llamahome.model.backends.token_losses import TokenLoss, summed_token_loss
from llamahome.model.packing import packing_of
from llamahome.model.precision import Precision

_BYTES_PER_HIDDEN, _BYTES_PER_INNER = 18, 8
"""Bytes that one token keeps per layer, per unit of hidden size and of feed-forward size. measured on a processor: 22.3 KB per token and
layer at 576 and 1,536 in bfloat16 (docs/log.md); 1.6 times that under autocast and 1.8 times in float32."""

_STATE_SIZES = ("state_size", "mamba_d_state", "ssm_state_size")
_STATE_COPIES = 4
"""An estimate: the state of a token, its inputs, and the product with it. The usual width is twice the hidden size."""


class Reference:
    """Plain torch."""

    name = "reference"
    micro_batch_tokens = min_micro_batch_tokens = 1536
    compiles = False
    compile_note = ""
    memory_gbps = 8.0
    """measured: a large copy on two cores."""
    pass_tokens_per_answer_token = 100.0
    """measured on a processor: 92 in bfloat16 and 103 in float32."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.device, self.precision = device, precision

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """Causal attention inside each document, [T, H, E of v]."""
        return reference_attention(q_THE, k_TKE, v_TKE, documents, scoring)

    def to_device(self, batch: B, /) -> B:
        """`batch` on the device."""
        names = ("tokens_T", "positions_T", "rows_N", "labels_N")
        tensors = {name: getattr(batch, name).to(self.device) for name in names}
        extra = {name: tensor.to(self.device) for name, tensor in batch.extra.items()}
        moved: B = replace(batch, **tensors, extra=extra)  # type: ignore[type-var]
        return moved

    def shares_prefixes(self, model: PreTrainedModel, /) -> bool:
        """Where the tokens are on the processor and all copies of a token have the same state."""
        return self.device.type == "cpu" and packing_of(model).shares_prefixes and not uses_dropout(model)

    def make_pass(self, batch: Batch, model: PreTrainedModel, /) -> Pass:
        """All tokens of the batch, but those that documents share only once."""
        if any(group.shared for group in batch.groups):
            return share_groups(batch)
        return Pass(batch.tokens_T, batch.positions_T, batch.rows_N, Documents(batch.lengths))

    def loss_sum(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """() float32: sum over targets of -log p(label)."""
        return summed_cross_entropy(hidden_ND, labels_N, head, dtype=self.precision.compute, tiles=self._tiles)

    def logprobs(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """[N] float32: log p(label) of each target."""
        return target_logprobs(hidden_ND, labels_N, head, dtype=self.precision.compute, tiles=self._tiles)

    def token_loss_sum(self, hidden_ND: Tensor, head: Head, loss: TokenLoss) -> Tensor:
        """() float32: sum over targets of another loss."""
        return summed_token_loss(hidden_ND, head, loss, dtype=self.precision.compute, tiles=self._tiles)

    def _tiles(self, matrix_VD: Tensor, head: Head) -> PlainTiles:
        return PlainTiles(matrix_VD, head)

    def stats(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> HeadStats:
        """Summed loss and number of targets ranked first, without gradients."""
        return head_stats(hidden_ND, labels_N, head, dtype=self.precision.compute)

    def compile_pays_off(self, tokens: float, *, weights: int, processes: int) -> bool:
        """Always, because nothing is compiled."""
        return True

    def cannot_compile(self) -> str | None:
        """The reason why nothing is compiled."""
        return "the reference back end is plain torch"

    def compile(self, model: PreTrainedModel) -> int:
        """Does nothing."""
        return 0

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """The states of every layer, and in a short pass the attention probabilities of every token with every other."""
        return plain_bytes(
            model.config.get_text_config(), tokens, precision=self.precision, keys=tokens if tokens <= MOST_WHOLE_TOKENS else 0
        )

    def recomputed_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """The inputs of the layers, and one layer of plain torch."""
        keys, block = (tokens, 0) if tokens <= MOST_WHOLE_TOKENS else (0, BLOCK_BYTES)
        return plain_recomputed_bytes(model.config.get_text_config(), tokens, precision=self.precision, keys=keys) + block

    def tile_tokens(self, compiled: bool) -> int | None:
        """Always tiles."""
        return TILE_TOKENS

    def tile_bytes(self, vocabulary: int) -> int:
        """The loss head's tile of logits and their gradient, in float32."""
        return 2 * 4 * max(16 * vocabulary, TILE_LOGITS)

    def performance_notes(self, model: PreTrainedModel) -> list[str]:
        """None: there is no faster path."""
        return []

    def timestamp(self) -> object:
        """The wall clock."""
        return time.perf_counter()

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """Seconds by the wall clock."""
        return float(later - earlier)

    def snapshot_out_of_memory(self, path: Path) -> bool:
        """False: the processor's memory has no such record."""
        return False

    def free_bytes(self, local_size: int) -> int | None:
        """None: the device uses the machine's memory."""
        return None

    def offload_store(self) -> OffloadStore | str:
        """A file for a processor."""
        return file_store() if self.device.type == "cpu" else "this device has the machine's memory, and its inputs of layers stay there"


def plain_bytes(config: Any, tokens: int, *, precision: Precision, keys: float) -> int:
    """Memory that uncompiled layers keep for the backward pass; attention keeps the probabilities of each token for `keys` keys."""
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    probabilities = (getattr(config, "num_attention_heads", None) or 0) * keys * precision.compute.itemsize
    layer = _factor(precision) * (_BYTES_PER_HIDDEN * hidden + _BYTES_PER_INNER * inner) + probabilities + _state_bytes(config)
    return int(tokens * config.num_hidden_layers * layer)


def plain_recomputed_bytes(config: Any, tokens: int, *, precision: Precision, keys: float) -> int:
    """Memory that uncompiled layers need if they are recomputed: their inputs, and the values and gradients of one."""
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inputs: int = tokens * hidden * config.num_hidden_layers * precision.storage.itemsize
    layer: int = plain_bytes(config, tokens, precision=precision, keys=keys) // config.num_hidden_layers
    spared = max(0, tokens - TILE_TOKENS) * _BYTES_PER_INNER * inner * _factor(precision) if not _has_experts(config) else 0
    layer += inputs - int(spared)
    return layer


def _has_experts(config: Any) -> bool:
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _factor(precision: Precision) -> float:
    """By how much more uncompiled layers keep than in 16 bits."""
    if precision.compute == torch.float32:
        return 1.8
    return 1.6 if precision.autocast else 1.0


def _state_bytes(config: Any) -> int:
    """Bytes per token of a recurrent layer (Mamba): plain torch keeps several float32 copies of the whole state."""
    size = next((value for name in _STATE_SIZES if isinstance(value := getattr(config, name, None), int)), 0)
    return _STATE_COPIES * 4 * 2 * int(config.hidden_size) * size


def reference_attention(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring) -> Tensor:
    """Causal attention inside documents, [T, H, E of v]: one masked product over all tokens of a short pass, T * T memory."""
    device, long = q_THE.device, len(q_THE) > MOST_WHOLE_TOKENS
    if long and not documents.groups:
        return attend_in_blocks(q_THE, k_TKE, v_TKE, documents, scoring)
    if documents.groups:
        return attend_masked(q_THE, k_TKE, v_TKE, ~visible_in_groups(documents.groups, scoring.window, device), scoring)
    document = torch.tensor([number for number, length in enumerate(documents.lengths) for _ in range(length)], device=device)
    position = torch.arange(len(document), device=device)
    hidden = (position[None, :] > position[:, None]) | (document[:, None] != document[None, :])
    if scoring.window is not None:
        hidden |= position[None, :] <= position[:, None] - scoring.window
    return attend_masked(q_THE, k_TKE, v_TKE, hidden, scoring)
