"""Runs a model layer by layer: the weights of a module are read from files just before it computes and dropped afterwards.

The memory of the largest module suffices. Experts that lie in the files one by one are stacked as transformers computes them.
"""

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llamahome.model.export.experts import stacked_reader


@contextlib.contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Parameters that modules make inside lie on the meta device; buffers are computed as usual."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def stream(folder: Path, read: Callable[[str], Tensor], names: Container[str]) -> PreTrainedModel | None:
    """A model of the config in `folder` whose modules get their weights from `read(name)` while they compute, in float32.

    None when the names of the files are not those of the modules in memory.
    """
    config = AutoConfig.from_pretrained(folder)
    with _weights_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    embedding = next(f"{name}.weight" for name, module in model.named_modules() if module is model.get_input_embeddings())
    sources: dict[str, Callable[[], Tensor]] = {}
    for name, _ in model.named_parameters():
        if name in names:
            sources[name] = partial(read, name)
        elif name == "lm_head.weight":
            sources[name] = partial(read, embedding)
        elif (stacked := stacked_reader(name, read, names)) is not None:
            sources[name] = stacked
        else:
            return None
    for path, module in model.named_modules():
        parameters = [name for name, _ in module.named_parameters(recurse=False)]
        if parameters:
            _load_while_computing(module, {name: sources[f"{path}.{name}" if path else name] for name in parameters})
    return model


def _load_while_computing(module: nn.Module, sources: Mapping[str, Callable[[], Tensor]]) -> None:
    empty = dict(module._parameters)

    def load(module: nn.Module, args: Any) -> None:
        for name, source in sources.items():
            module._parameters[name] = nn.Parameter(source().float(), requires_grad=False)

    def drop(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


def add_lora_hooks(model: nn.Module, loras: Mapping[str, tuple[Callable[[], tuple[Tensor, Tensor]], float]]) -> None:
    """Add `scale * B(A(x))` to the output of each module named in `loras`, which gives A and B when they are needed.

    This is the adapter as PEFT computes it beside the base, so that a merged weight is compared with something else than itself.
    """
    modules = dict(model.named_modules())
    for path, (matrices, scale) in loras.items():

        def add(module: nn.Module, args: Any, output: Tensor, matrices: Any = matrices, scale: float = scale) -> Tensor:
            a, b = matrices()
            added: Tensor = scale * (args[0] @ a.T @ b.T)
            return output + added

        modules[path].register_forward_hook(add)
