"""The sizes of a model that a plan needs, and the configs of well-known models, so that planning them downloads nothing.

All layers are assumed to be alike: a model is its number of layers times one layer, and a rest (embeddings, last norm, output head).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LLAMA_3 = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 5e5}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m-instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": _LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-70b": _LLAMA_3 | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""The fields of these models' config.json that decide their size. Sources: "The Llama 3 Herd of Models" (arXiv
2407.21783, table 3); docs/log.md for the starter."""


@dataclass(frozen=True)
class LayerShape:
    """Weights of one layer, or of everything outside the layers."""

    frozen: int
    trained: int
    products: int
    """Weights in matrix products of every token, adapters included: no embeddings, no norms, no output head."""
    trained_products: int

    @property
    def weights(self) -> int:
        """Frozen and trained weights."""
        return self.frozen + self.trained


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model and of its trained weights."""

    name: str
    layers: int
    layer: LayerShape
    rest: LayerShape
    hidden: int
    attention: int
    """Heads times head size."""
    head: int
    """Weights of the output head, also if they are tied to the embeddings."""
    head_trained: bool
    state_bytes: float = 8.0
    """Of the optimizer, per trained weight."""
    started: int = 0
    """Frozen numbers of the adapters in float32: what the trained ones began with, or the matrices that layers of VeRA share."""

    @property
    def weights(self) -> int:
        """Weights of the whole model, adapters included."""
        return self.layers * self.layer.weights + self.rest.weights

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        return self.layers * self.layer.trained + self.rest.trained


def spread_over_layers(
    layer: Mapping[str, int], rest: Mapping[str, int], whole: Mapping[str, int], layers: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Counts of a layer and of the rest that add up to those of a `whole` model whose layers have different adapters.

    `layer` and `rest` are those of a model with equal adapters; what is frozen stays. A layer gets the average, the rest what is left over.
    """
    each = {key: layer[key] if key == "frozen" else (whole[key] - rest[key]) // layers for key in layer}
    return each, {key: rest[key] if key == "frozen" else whole[key] - layers * each[key] for key in rest}


def flops_per_token(shape: ModelShape, *, length: float, target_share: float, recomputes: bool) -> float:
    """Floating-point operations per token, forward and backward, in documents of `length` tokens.

    A weight costs 2 forward, 2 for the gradient of its input and, if it is trained, 2 for its own gradient. A query attends to half of its
    document on average: 2 * length * (heads * head size) per layer forward, twice that backward. `recomputes` runs each layer's forward
    twice.
    """
    part = shape.layer
    attention = 2.0 * length * shape.attention
    layer = 4.0 * part.products + 2.0 * part.trained_products + 3.0 * attention
    if recomputes:
        layer += 2.0 * part.products + attention
    rest = 4.0 * shape.rest.products + 2.0 * shape.rest.trained_products
    return shape.layers * layer + rest + target_share * shape.head * (6.0 if shape.head_trained else 4.0)
