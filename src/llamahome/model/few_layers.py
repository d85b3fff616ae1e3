"""A model with few layers, or in float32, for tests of how its code runs.

The layers of a streamed model would be read from the disk several times; those of a sharded one are gathered from all processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llamahome.model.packing import decoder_of
from llamahome.model.shard_load import mesh_of, whole_weights
from llamahome.model.stream import stream_of


@contextmanager
def few_layers(model: PreTrainedModel, *, always: bool = False) -> Iterator[None]:
    """A streamed or sharded `model` with its first layers only, at least two and one of each kind; other models only if `always`.

    What a test of the code shows is the same for all layers of a kind. Layers with rotary tables of their own are all there, because a test
    may replace those (rotary.py). Sharded weights are whole within, so all processes enter it.
    """
    stream, decoder = stream_of(model), decoder_of(model)
    if stream is None and mesh_of(model) is None and not always:
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
        with whole_weights(model) if stream is None else stream.first_layers(count):
            yield
    finally:
        setattr(owner, name, layers)
        config.num_hidden_layers = whole


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Forward passes of `model` in float32: the weights of each module are converted while it computes, one module at a time.

    Embeddings are not converted, but their outputs are.
    """
    own: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def convert(module: nn.Module, _: Any) -> None:
        own[module] = dict(module._parameters)
        for name, weight in own[module].items():
            if weight is not None and weight.is_floating_point():
                module._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)

    def restore(module: nn.Module, *_: Any) -> None:
        module._parameters.update(own.pop(module))

    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda module, inputs, output: output.float()))
        elif any(weight is not None for weight in module._parameters.values()):
            handles += [module.register_forward_pre_hook(convert), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weights in own.items():  # those in which a pass ended
            module._parameters.update(weights)


def _one_of_each(layers: nn.ModuleList, types: Sequence[str]) -> int:
    """The number of first layers that hold every kind of layer, at least two; all if they have rotary tables."""
    named = [*types, *[""] * (len(layers) - len(types))]
    if any("Rotary" in type(module).__name__ for module in layers.modules()):
        return len(layers)
    kinds = [(kind, *(type(module) for module in layer.modules())) for kind, layer in zip(named, layers, strict=False)]
    return min(len(layers), max(2, max(kinds.index(kind) for kind in kinds) + 1))
