"""The sizes of a model with what is trained on it, from models of two depths that have no weights.

Adapters that differ between layers are counted in a model of all layers, and spread evenly over them.
"""

from typing import Any

from llamahome.config.optimizers import STATE_BYTES
from llamahome.config.schema import Config
from llamahome.errors import ConfigError, Problem
from llamahome.model.backends.backend import Backend
from llamahome.model.load import CausalLM
from llamahome.model.lora import add_lora
from llamahome.model.lora_init import SUBTRACTED
from llamahome.model.precision import Precision
from llamahome.model.skeleton import count_weights, skeleton
from llamahome.model.targets import copied_bytes
from llamahome.planning.shapes import LayerShape, ModelShape, spread_over_layers

DEPTHS = (2, 3)
"""Layers of the models that are placed: with one more layer everything that a layer brings comes once more."""
_ALIKE: dict[str, Any] = {"layers": [], "rank_pattern": {}, "alpha_pattern": {}}
"""Settings with which the adapters of all layers are alike."""


def prepared_model(config: Config, precision: Precision, read: Any, layers: int) -> CausalLM:
    """A model of `layers` without weights, with what is trained on it."""
    model = skeleton(read, layers=layers, dtype=precision.storage)
    if config.training.method == "lora":
        add_lora(model, config.lora, base=config.model.name, seed=config.training.seed, lean=not precision.autocast)
    return model


def measure(config: Config, backend: Backend, read: Any, layers: int, tokens: int) -> tuple[ModelShape, int]:
    """Weights of a layer and of the rest, and what a pass keeps for its backward pass, from models of two depths and of all layers."""
    precision = backend.precision
    alike = config.model_copy(update={"lora": config.lora.model_copy(update=_ALIKE)})
    few, many = (prepared_model(alike, precision, read, depth) for depth in DEPTHS)
    heads = few.get_output_embeddings().weight, many.get_output_embeddings().weight
    first, second = count_weights(few, heads[0]), count_weights(many, heads[1])
    layer = {key: (second[key] - first[key]) // (DEPTHS[1] - DEPTHS[0]) for key in first}
    rest = {key: first[key] - DEPTHS[0] * layer[key] for key in first}
    if differs(config):
        layer, rest = spread_over_layers(layer, rest, _whole_counts(config, precision, read, layers), layers)
    text = read.get_text_config()
    heads_width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    shape = ModelShape(
        name=config.model.name,
        layers=layers,
        layer=_shape_of(layer),
        rest=_shape_of(rest),
        hidden=text.hidden_size,
        attention=heads_width,
        head=heads[0].numel(),
        head_trained=heads[0].requires_grad,
        state_bytes=STATE_BYTES[config.training.optimizer],
        started=layers * layer["adapters"] + rest["adapters"] if config.lora.init in SUBTRACTED else 0,
    )
    whole = skeleton(read, layers=layers, dtype=precision.storage)
    if sum(each.numel() for each in whole.parameters()) != shape.weights - (shape.trained if shape.layer.frozen else 0):
        message = f"the {layers} layers of {config.model.name} are not alike, so they cannot be planned from a few of them"
        raise ConfigError(Problem(code="model.unplannable", message=message, where="model.name", hint="--model llama-3-8b"))
    longest = min(config.data.max_length, tokens)
    compiled = config.training.compile is not False
    copied = copied_bytes(whole, config.lora.target_modules) if config.training.method == "lora" else 0
    return shape, copied + backend.kept_bytes(config, whole, tokens, longest=longest, compiled=compiled)


def differs(config: Config) -> bool:
    """Whether some layers have other adapters than others."""
    lora = config.lora
    return config.training.method == "lora" and bool(lora.layers or lora.rank_pattern)


def _whole_counts(config: Config, precision: Precision, read: Any, layers: int) -> dict[str, int]:
    """The number of weights by use in a model of all layers."""
    whole = prepared_model(config, precision, read, layers)
    return count_weights(whole, whole.get_output_embeddings().weight)


def _shape_of(counts: dict[str, int]) -> LayerShape:
    return LayerShape(**{key: count for key, count in counts.items() if key != "adapters"})
