"""Decoder layers under torch.compile: for each size of pass once, shared by all layers that are alike.

Attention stays outside of the graphs, so neither the number of documents nor their lengths are part of what was compiled: a graph depends
on the number of tokens alone, and these come in few sizes (passes.py). Evaluation runs uncompiled, for its own graphs would cost as much
time again. Where compiling fails, the run goes on without and says so.
"""

import logging
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from llamahome.model.attention import register_attention
from llamahome.model.load import decoder_layers

_LOG = logging.getLogger(__name__)
COMPILER = "inductor"
_GRAPHS = 512
"""Of one function: sizes of passes times kinds of layers. torch stops compiling at 8, and goes on uncompiled."""
_WITH_CHECKPOINTING = "forward_with_checkpointing"
"""What transformers 5.23 wraps around the forward of a layer; it stays outside of the graph."""


class Compiled:
    """A function under torch.compile that goes back to the plain one for good when it cannot be compiled."""

    def __init__(self, function: Callable[..., Any], switch: "Switch", *, whole: bool = False) -> None:
        self._plain, self._switch = function, switch
        self._compiled = torch.compile(function, dynamic=False, fullgraph=whole, backend=COMPILER)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        if not self._switch.on:
            return self._plain(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._switch.turn_off(error)
        return self._plain(*args, **kwargs)


class Switch:
    """Whether compiled functions are used; one for all parts of a model."""

    def __init__(self) -> None:
        self.on = True

    def turn_off(self, error: BaseException) -> None:
        """Said once, on the screen."""
        self.on = False
        _LOG.error("torch.compile failed, the run goes on without it and is slower: %s", _first_words(error))


def _first_words(error: BaseException) -> str:
    """The first two lines that say something: the first often says only which compiler raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def compile_layers(model: PreTrainedModel, switch: Switch) -> int:
    """Let every decoder layer of `model` run compiled while it learns; returns how many."""
    _prepare_compiler()
    register_attention(outside_graphs=True)
    layers = decoder_layers(model)
    for layer in layers:
        _compile_layer(layer, switch)
    return len(layers)


def _prepare_compiler() -> None:
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * _GRAPHS)
    # Both directions in the forward pass: what fails in the backward pass could not be done again without compiling.
    torch._functorch.config.force_non_lazy_backward_lowering = True


def why_not_compiled(device: torch.device) -> str | None:
    """Compiles a small function to see that a compiler is there; why not."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1, backend=COMPILER)(torch.ones(16, device=device))
    except (torch._dynamo.exc.TorchDynamoException, OSError, ImportError) as error:
        return f"torch.compile does not work here: {_first_words(error)}"
    return None


def _compile_layer(layer: Any, switch: Switch) -> None:
    own: Any = type(layer).forward
    checkpoints = own.__code__.co_name == _WITH_CHECKPOINTING
    plain = MethodType(own.__wrapped__ if checkpoints else own, layer)
    compiled = Compiled(plain, switch)

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        run = compiled if torch.is_grad_enabled() else plain
        if checkpoints and layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(run, **kwargs), *args)
        return run(*args, **kwargs)

    layer.forward = forward
