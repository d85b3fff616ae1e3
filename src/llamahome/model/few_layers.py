"""A streamed model with few layers, for tests of how its code runs: all layers would be read from the disk several times."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from llamahome.model.packing import decoder_of
from llamahome.model.stream import stream_of


@contextmanager
def few_layers(model: PreTrainedModel) -> Iterator[None]:
    """A streamed `model` with its first layers only, at least two and one of each kind, for tests of how its code runs; others unchanged.

    A test reads the base several times, and what it shows is the same for all layers of a kind. Layers with rotary tables of their own are
    all there, because a test may replace those (rotary.py).
    """
    stream, decoder = stream_of(model), decoder_of(model)
    if stream is None:
        yield
        return
    lists = [
        (module, name, each) for module in decoder.modules() for name, each in module.named_children() if isinstance(each, nn.ModuleList)
    ]
    owner, name, layers = max(lists, key=lambda found: len(found[2]))
    config = model.config.get_text_config()
    whole, count = config.num_hidden_layers, _one_of_each(layers, getattr(config, "layer_types", None) or [])
    setattr(owner, name, nn.ModuleList(layers[:count]))
    config.num_hidden_layers = count
    try:
        with stream.first_layers(count):
            yield
    finally:
        setattr(owner, name, layers)
        config.num_hidden_layers = whole


def _one_of_each(layers: nn.ModuleList, types: Sequence[str]) -> int:
    """The number of first layers that hold every kind of layer, at least two; all if they have rotary tables."""
    named = [*types, *[""] * (len(layers) - len(types))]
    if any("Rotary" in type(module).__name__ for module in layers.modules()):
        return len(layers)
    kinds = [(kind, *(type(module) for module in layer.modules())) for kind, layer in zip(named, layers, strict=False)]
    return min(len(layers), max(2, max(kinds.index(kind) for kind in kinds) + 1))
