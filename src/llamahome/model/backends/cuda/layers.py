"""Decoder layers under torch.compile: compiled once per size of pass, and shared by all layers with the same code.

Attention stays outside of the graphs, so a graph depends on the number of tokens alone, not on the number or lengths of documents. Passes
come in few sizes (passes.py). Evaluation runs uncompiled, because its own graphs would take as long to compile again. If compiling fails,
the run logs an error and continues without it.
"""

import logging
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from llamahome.model.attention import register_attention
from llamahome.model.load import decoder_layers
from llamahome.model.recompute import plain_forward, recomputing

_LOG = logging.getLogger(__name__)
COMPILER = "inductor"
_MAX_GRAPHS = 512
"""Per function: sizes of passes times kinds of layers. torch's default is 8, beyond which it runs uncompiled."""


class Compiled:
    """A function under torch.compile that falls back to the plain function for good if it cannot be compiled."""

    def __init__(self, function: Callable[..., Any], switch: "Switch", *, fullgraph: bool = False) -> None:
        self._plain, self._switch = function, switch
        self._compiled = torch.compile(function, dynamic=False, fullgraph=fullgraph, backend=COMPILER)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the function."""
        if not self._switch.on:
            return self._plain(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._switch.turn_off(error)
        return self._plain(*args, **kwargs)


class Switch:
    """Whether compiled functions are used; one switch for all parts of a model."""

    def __init__(self) -> None:
        self.on = True

    def turn_off(self, error: BaseException) -> None:
        """Use the plain functions from now on, and log the reason."""
        self.on = False
        _LOG.error("torch.compile failed, the run goes on without it and is slower: %s", _first_lines(error))


def _first_lines(error: BaseException) -> str:
    """The first two lines of the message; the first alone often names only the compiler."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def compile_layers(model: PreTrainedModel, switch: Switch) -> int:
    """Compile every decoder layer of `model` for training; returns the number of layers."""
    _configure_compiler()
    register_attention(outside_graphs=True)
    layers = decoder_layers(model)
    for layer in layers:
        _compile_layer(layer, switch)
    return len(layers)


def _configure_compiler() -> None:
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MAX_GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * _MAX_GRAPHS)
    # Compile both directions in the forward pass, because a failure in the backward pass could not fall back to plain code.
    torch._functorch.config.force_non_lazy_backward_lowering = True


def why_not_compiled(device: torch.device) -> str | None:
    """Compile a small function to check the compiler; returns the reason if that fails."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1, backend=COMPILER)(torch.ones(16, device=device))
    except (torch._dynamo.exc.TorchDynamoException, OSError, ImportError) as error:
        return f"torch.compile does not work here: {_first_lines(error)}"
    return None


def _compile_layer(layer: Any, switch: Switch) -> None:
    plain = MethodType(plain_forward(layer), layer)
    compiled = Compiled(plain, switch)

    @wraps(type(layer).forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    layer.forward = recomputing(layer, run)  # outside of the graph
