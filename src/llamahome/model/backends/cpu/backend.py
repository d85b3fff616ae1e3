"""The back end for processors: kernels compiled on this machine where they are proved equal and faster, plain torch everywhere else.

Without a compiler, or in runs too short for compiling, attention runs in blocks of plain torch and everything else as in the reference back
end.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.backend import TILE_TOKENS, Batch, Documents, Pass, Scoring
from llamahome.model.backends.cpu import native
from llamahome.model.backends.cpu.autotune import ProductShape, Speedups, autotune, details, summary
from llamahome.model.backends.cpu.blocks import LONGEST_KEPT, QUERY_BLOCK, block_attention
from llamahome.model.backends.cpu.fuse import fuse, recomputes_activations
from llamahome.model.backends.cpu.head import CompiledTiles
from llamahome.model.backends.cpu.merged_linear import merged_shape
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.shared_prefix import share_prefix
from llamahome.model.backends.cpu.tiled import can_tile, partial_bytes, tiled_attention, will_tile
from llamahome.model.backends.cpu.widen import use_kernels
from llamahome.model.backends.groups import attend_groups, uses_dropout
from llamahome.model.backends.loss import Head, PlainTiles
from llamahome.model.backends.query_blocks import MOST_WHOLE_TOKENS
from llamahome.model.backends.reference import Reference, plain_bytes, plain_recomputed_bytes, reference_attention
from llamahome.model.packing import packing_of
from llamahome.model.precision import Precision

_BLOCK_ARRAYS = 3
"""Arrays of a block's scores in the backward pass of attention. measured: 3 in bfloat16, 2.1 in float32, at 4,608 tokens."""


class CpuBackend(Reference):
    """`kernels` is None until `compile`."""

    name = "cpu"
    micro_batch_tokens = 1536
    """measured (docs/log.md): 1,536 tokens take 1 % more time and 200 MB less than 2,048 (starter); 1,024 take 4 % more time."""
    compiles = True

    def __init__(self, precision: Precision, *, kernels: Kernels | None = None) -> None:
        super().__init__(torch.device("cpu"), precision)
        self.kernels = kernels
        self._head_speedups: Speedups | None = None

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """Attention in compiled tiles if possible, otherwise in blocks; if scores are capped or dropped, as the reference does."""
        if scoring.softcap is not None or scoring.dropout:
            return reference_attention(q_THE, k_TKE, v_TKE, documents, scoring)
        if documents.groups:
            return attend_groups(self.attend, q_THE, k_TKE, v_TKE, documents.groups, scoring)
        q_THE, k_TKE = q_THE.to(v_TKE.dtype), k_TKE.to(v_TKE.dtype)  # under autocast, rotary embeddings leave them in float32
        scale, window = scoring.scale, scoring.window
        if self.kernels is not None and can_tile(q_THE, k_TKE, v_TKE, self.kernels):
            return tiled_attention(q_THE, k_TKE, v_TKE, documents, scale=scale, window=window, kernels=self.kernels)
        return block_attention(q_THE, k_TKE, v_TKE, documents, scale=scale, window=window, kernels=self.kernels)

    def make_pass(self, batch: Batch, model: PreTrainedModel, /) -> Pass:
        """The tokens of the batch; those that all documents begin with only once, if all copies of a token have the same state."""
        if any(group.shared for group in batch.groups):
            return super().make_pass(batch, model)
        if (
            not packing_of(model).shares_prefixes
            or uses_dropout(model)
            or getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        ):
            return super().make_pass(batch, model)
        prefixed = share_prefix(batch.tokens_T, batch.positions_T, batch.rows_N, batch.lengths)
        return Pass(prefixed.tokens_C, prefixed.positions_C, prefixed.rows_N, Documents(batch.lengths, prefixed.shared))

    def _tiles(self, matrix_VD: Tensor, head: Head) -> PlainTiles:
        if self.kernels is None:
            return PlainTiles(matrix_VD, head)
        return CompiledTiles(matrix_VD, head, self.kernels, self._head_speedups)

    def compile_pays_off(self, tokens: float, *, weights: int, processes: int) -> bool:
        """Whether the library is in the cache, or the run is long enough to save the time of compiling it."""
        return not native.must_compile() or native.compile_pays_off(tokens, weights=weights, processes=processes)

    def cannot_compile(self) -> str | None:
        """The reason why the library cannot be compiled, or None; compiles it once per machine."""
        kernels = native.load_kernels()
        return kernels if isinstance(kernels, str) else None

    def compile(self, model: PreTrainedModel) -> int:
        """Replace the parts of `model` that are proved equal."""
        kernels = native.load_kernels()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        self.kernels = kernels
        use_kernels(model, kernels)
        speedups: dict[ProductShape, Speedups] = {}
        parts = fuse(model, self, kernels=kernels, speedups=speedups)
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            shape = merged_shape([head], tokens=self.micro_batch_tokens, compute=self.precision.compute)
            speedups |= autotune([shape], kernels)
            self._head_speedups = speedups.get(shape)
        if speedups:
            logging.getLogger(__name__).info("products: %s", details(speedups))
            self.compile_note = summary(speedups)
        return parts

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """Blocks keep the probabilities below the diagonal, tiles recompute them; compiled norms and gates are recomputed as well."""
        text, compute = model.config.get_text_config(), self.precision.compute
        if packing_of(model).why_alone is not None:
            return plain_bytes(text, tokens, precision=self.precision, keys=longest)
        compiled = compiled and native.has_compiler()
        keys = self._keys(text, tokens, longest=longest, compiled=compiled)
        if not self._fuses(config, model, compiled=compiled):
            return plain_bytes(text, tokens, precision=self.precision, keys=keys)
        heads, size, inner = _sizes(text)
        attention = 2 * size * (heads + text.num_key_value_heads) + heads * keys
        scaled = _scaled_outputs(config, text)
        layer = 2 * text.hidden_size * self.precision.storage.itemsize + (attention + 2 * inner + scaled) * compute.itemsize
        # one more layer stands for temporary gradients
        return int(tokens * (text.num_hidden_layers * layer + layer - heads * keys * compute.itemsize))

    def recomputed_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """The input of each layer, and the more of what a fused layer's backward pass needs in attention and in a tile of its block."""
        text, precision = model.config.get_text_config(), self.precision
        if packing_of(model).why_alone is not None:
            return plain_recomputed_bytes(text, tokens, precision=precision, keys=longest)
        compiled = compiled and native.has_compiler()
        keys = self._keys(text, tokens, longest=longest, compiled=compiled)
        if not self._fuses(config, model, compiled=compiled):
            blocks = 0 if keys or (compiled and will_tile(text, precision.compute)) else _BLOCK_ARRAYS * QUERY_BLOCK * longest
            block_bytes: int = blocks * text.num_attention_heads * precision.compute.itemsize
            return plain_recomputed_bytes(text, tokens, precision=precision, keys=keys) + block_bytes
        heads, size, inner = _sizes(text)
        state, low = text.hidden_size * precision.storage.itemsize, precision.compute.itemsize
        qkv, out = size * (heads + 2 * text.num_key_value_heads) * low, size * heads * low
        scaled = _scaled_outputs(config, text) * low
        partial = partial_bytes(text, precision.compute, tokens, longest=longest) if will_tile(text, precision.compute) else 0
        attention = tokens * (state + 2 * qkv + 2 * out + scaled) + partial
        block = tokens * (3 * state + qkv + out + scaled) + min(tokens, TILE_TOKENS) * (6 if scaled else 3) * inner * low
        return int(tokens * (state * text.num_hidden_layers + heads * keys * low) + max(attention, block))

    def _fuses(self, config: Config, model: PreTrainedModel, *, compiled: bool) -> bool:
        return compiled and _recomputes(config, self.precision) and recomputes_activations(model)

    def _keys(self, text: Any, tokens: int, *, longest: int, compiled: bool) -> float:
        """The keys of a query whose probabilities are kept."""
        if getattr(text, "attn_logit_softcapping", None) or getattr(text, "attention_dropout", 0.0):
            return tokens if tokens <= MOST_WHOLE_TOKENS else 0
        if longest > LONGEST_KEPT or (compiled and will_tile(text, self.precision.compute)):
            return 0
        return longest / 2 + QUERY_BLOCK / 2


def _sizes(text: Any) -> tuple[int, int, int]:
    """Heads, the size of a head, and that of a feed-forward block."""
    heads = text.num_attention_heads
    return (
        heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
    )


def _scaled_outputs(config: Config, text: Any) -> int:
    """Numbers that a layer keeps of a token for the gradients of DoRA's magnitudes, beside what it keeps anyway."""
    heads, size, _ = _sizes(text)
    kept = 2 * text.hidden_size + size * (heads + 2 * text.num_key_value_heads)
    return kept if config.training.method == "lora" and config.lora.use_dora else 0


def _recomputes(config: Config, precision: Precision) -> bool:
    """Whether this kind of training lets fuse.py recompute norms and gates in the backward pass."""
    supported = config.training.method == "full" or not config.lora.dropout
    return supported and precision.autocast == (config.training.method == "full")
