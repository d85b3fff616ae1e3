"""What a pass keeps on a GPU for its backward pass, from the shapes of a layer.

A compiled layer of the form of Llama keeps, per token: its input and the state after attention (for the norms), both normed (inputs of
linear layers), queries, keys and values as attention takes them, its output, gate, up and their product. Nothing else is kept: attention
makes its probabilities again, and element-wise parts are made again inside of the passes that need them. Against the three rows that were
measured on an H100 (docs/log.md) the totals are within 4 %: tests/model/backends/cuda/test_memory.py.
"""

from typing import Any

import torch

from llamahome.model.backends.reference import plain_bytes
from llamahome.model.precision import Precision


def layer_bytes(config: Any, precision: Precision) -> int:
    """Of one token in one compiled layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner *= getattr(config, "num_experts_per_tok", None) or 1
    keys = getattr(config, "num_key_value_heads", None) or heads
    states, products = precision.storage.itemsize, precision.compute.itemsize
    found: int = 2 * hidden * states + (2 * hidden + 2 * size * (heads + keys) + 3 * inner) * products
    return found


def pass_bytes(config: Any, tokens: int, *, precision: Precision, compiled: bool) -> int:
    """Of `tokens` in all layers."""
    keys = tokens if keeps_probabilities(config) else 0
    if not compiled or keys:
        return plain_bytes(config, tokens, precision=precision, keys=keys)
    return tokens * int(config.num_hidden_layers) * layer_bytes(config, precision)


def tile_bytes(vocabulary: int, rows: int, dtype: torch.dtype) -> int:
    """Of the loss head's tile: raw logits, and as float32."""
    return rows * vocabulary * (dtype.itemsize + 4)


def keeps_probabilities(config: Any) -> bool:
    """Whether attention caps or drops its scores, for which torch has no kernel that makes them again."""
    return bool(getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0.0))
