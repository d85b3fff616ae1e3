"""The sizes of a configured model and of the passes that it trains on, from models of a few layers without weights.

Adapters that differ between layers are counted in a model of all layers, and spread evenly over them.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llamahome.config.initial import SUBTRACTED
from llamahome.config.optimizers import STATE_BYTES
from llamahome.config.schema import Config
from llamahome.errors import ConfigError, Problem
from llamahome.model.adapter_coverage import coverage_lines
from llamahome.model.backends.backend import Backend
from llamahome.model.load import CausalLM
from llamahome.model.lora import add_lora
from llamahome.model.lora_choice import refuse_quantized
from llamahome.model.lora_vera import FactorBytes, factor_bytes, projection_numbers
from llamahome.model.offload import input_bytes, spared_bytes
from llamahome.model.place import longest_pass
from llamahome.model.precision import Precision
from llamahome.model.quantized_sizes import quantizable
from llamahome.model.skeleton import count_weights, skeleton
from llamahome.model.targets import copied_bytes
from llamahome.model.vocabulary import NO_NEW_ROWS, NewRows, make_rows, refuse_lost_bias
from llamahome.pass_memory import MOST_TOKENS, documents_of_row, offload_room
from llamahome.planning.forecast import Work, fits_in
from llamahome.planning.hardware import Device
from llamahome.planning.memory import ShardLayout
from llamahome.planning.shapes import LayerShape, ModelShape, spread_over_layers

DEPTHS = (2, 3)
"""Layers of the models that are placed: with one more layer everything that a layer brings comes once more."""
_ALIKE: dict[str, Any] = {"layers": [], "rank_pattern": {}, "alpha_pattern": {}}
"""Settings with which the adapters of all layers are alike."""


def adapters_of(config: Config, precision: Precision, read: Any, base: Path, rows: NewRows) -> list[str]:
    """What gets adapters and what does not, in lines; none without LoRA. Raises ConfigError if a run cannot train these new `rows`."""
    if config.training.method != "lora":
        return []
    layers = int(read.get_text_config().num_hidden_layers)
    if make_rows(grown := skeleton(read, layers=layers, dtype=precision.storage), rows):
        refuse_lost_bias(grown, base, method=config.training.method)
    return coverage_lines(prepared_model(config, precision, read, layers, rows=rows))


def prepared_model(config: Config, precision: Precision, read: Any, layers: int, *, rows: NewRows = NO_NEW_ROWS) -> CausalLM:
    """A model of `layers` without weights, with what is trained on it, and the new `rows` of its embedding and head."""
    model = skeleton(read, layers=layers, dtype=precision.storage)
    if config.training.method == "lora":
        if config.model.quantization is not None:
            refuse_quantized(config.lora.modules_to_save, quantizable(model)[0])
        added, lean = make_rows(model, rows), not precision.autocast
        add_lora(model, config.lora, base=config.model.name, seed=config.training.seed, lean=lean, new_rows=added)
    return model


@dataclass(frozen=True)
class Activations:
    """What a pass keeps for its backward pass, by its number of tokens."""

    config: Config
    backend: Backend
    whole: CausalLM
    """The model with all its layers, without weights or adapters."""

    def of(self, tokens: int, *, longest: int | None = None, compiled: bool | None = None) -> tuple[int, int]:
        """Bytes that are kept if nothing is recomputed, and if layers are; `longest` document, data.max_length by default.

        Layers are `compiled` by default unless training.compile is false.
        """
        if compiled is None:
            compiled = self.config.training.compile is not False
        lora = self.config.training.method == "lora"
        copied = copied_bytes(self.whole, self.config.lora.target_modules) if lora else 0
        longest = longest or min(self.config.data.max_length, tokens)
        kept = self.backend.kept_bytes(self.config, self.whole, tokens, longest=longest, compiled=compiled)
        recomputed = self.backend.recomputed_bytes(self.config, self.whole, tokens, longest=longest, compiled=compiled)
        beside, beside_again = (self._factors.of(tokens, recomputes=recomputes) for recomputes in (False, True))
        return copied + kept + beside, copied + recomputed + beside_again

    @cached_property
    def _factors(self) -> FactorBytes:
        lora = self.config.training.method == "lora"
        return factor_bytes(self.whole, self.config.lora, self.backend.precision.compute) if lora else FactorBytes()

    def offloaded(self, tokens: int, recomputed: int) -> int:
        """What remains of `recomputed` bytes if the inputs of layers wait outside of the device's memory."""
        return recomputed - spared_bytes(self.whole, tokens, self.backend.precision)

    def layer(self, tokens: int, recomputed: int) -> int:
        """What of `recomputed` bytes is there only while a layer is computed again."""
        return recomputed - input_bytes(self.whole, tokens, self.backend.precision)

    @cached_property
    def room(self) -> int:
        """Bytes for inputs of layers outside of this machine's device; 0 if there is no place for them."""
        store = self.backend.offload_store()
        return 0 if isinstance(store, str) else offload_room(store, processes=1)

    def moves(self, tokens: int) -> bool:
        """Whether there is room for the inputs of all layers in a pass of `tokens`."""
        return 0 < input_bytes(self.whole, tokens, self.backend.precision) <= self.room

    @property
    def offloads(self) -> bool | None:
        """training.activation_offloading; None for auto."""
        wanted = self.config.training.activation_offloading
        return None if wanted == "auto" else wanted


def measure(config: Config, backend: Backend, read: Any, layers: int) -> tuple[ModelShape, Activations]:
    """Weights of a layer and of the rest, and what passes keep, from models of two depths and of all layers."""
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
    whole, started = skeleton(read, layers=layers, dtype=precision.storage), 0
    if config.training.method == "lora":
        subtracted = config.lora.init in SUBTRACTED
        started = layers * layer["adapters"] + rest["adapters"] if subtracted else projection_numbers(whole, config.lora)
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
        started=started,
    )
    if sum(each.numel() for each in whole.parameters()) != shape.weights - (shape.trained if shape.layer.frozen else 0):
        message = f"the {layers} layers of {config.model.name} are not alike, so they cannot be planned from a few of them"
        raise ConfigError(Problem(code="model.unplannable", message=message, where="model.name", hint="--model llama-3-8b"))
    return shape, Activations(config, backend, whole)


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


def longest_row(shape: ModelShape, layout: ShardLayout, device: Device, work: Work, activations: Activations) -> int:
    """Tokens of the longest row that fits with the settings of `work`; with preferences, of each of the two answers with their prompt."""
    together = documents_of_row(activations.config)

    def fits(tokens: int) -> bool:
        count = together * tokens
        kept, recomputed = activations.of(count, longest=tokens)
        alone = replace(
            work,
            tokens=count,
            length=tokens,
            kept_bytes=kept,
            recomputed_bytes=recomputed,
            offloaded_bytes=activations.offloaded(count, recomputed),
            layer_bytes=activations.layer(count, recomputed),
            offloads=work.offloads if activations.moves(count) else False,
        )
        return fits_in(shape, layout, device, alone)

    return longest_pass(fits, most=MOST_TOKENS)


def longest_rows(shape: ModelShape, layout: ShardLayout, device: Device, work: Work, activations: Activations) -> tuple[int, int | None]:
    """`longest_row` as set, and without activation offloading, or with it if it is off; None if nothing can be moved."""
    wanted = activations.offloads
    other = replace(work, offloads=wanted is False)
    as_set = longest_row(shape, layout, device, replace(work, offloads=wanted), activations)
    return as_set, longest_row(shape, layout, device, other, activations) if activations.room else None
