"""The memory that a pass on a GPU keeps for its backward pass, from the shapes of a layer.

A compiled layer of Llama's form keeps, per token: its input and the state after attention (for the norms), both normed states (inputs of
linear layers), queries, keys and values, the attention output, gate, up and their product. The backward pass recomputes attention
probabilities and element-wise operations. The totals are within 4 % of three runs measured on an H100 (docs/log.md):
tests/model/backends/cuda/test_memory.py.
"""

from typing import Any

import torch

from llamahome.model.backends.reference import plain_bytes
from llamahome.model.precision import Precision


def layer_bytes(config: Any, precision: Precision) -> int:
    """Bytes that one token keeps in one compiled layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner *= getattr(config, "num_experts_per_tok", None) or 1
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    states, products = precision.storage.itemsize, precision.compute.itemsize
    result: int = 2 * hidden * states + (2 * hidden + 2 * size * (heads + key_heads) + 3 * inner) * products
    return result


def pass_bytes(config: Any, tokens: int, *, precision: Precision, compiled: bool) -> int:
    """Bytes that `tokens` keep in all layers."""
    keys = tokens if keeps_probabilities(config) else 0
    if not compiled or keys:
        return plain_bytes(config, tokens, precision=precision, keys=keys)
    return tokens * int(config.num_hidden_layers) * layer_bytes(config, precision)


def tile_bytes(vocabulary: int, rows: int, dtype: torch.dtype) -> int:
    """Bytes of the loss head's tile: the raw logits, and float32 copies of them."""
    return rows * vocabulary * (dtype.itemsize + 4)


def keeps_probabilities(config: Any) -> bool:
    """Whether attention caps or drops its scores; torch has no kernel that recomputes the probabilities of such attention."""
    return bool(getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0.0))
