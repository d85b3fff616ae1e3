"""Moves the inputs of recomputed layers out of the device's memory between the forward and the backward pass (activation offloading).

With gradient checkpointing, what is kept between the two passes is the input of each layer. Here it is copied to the back end's store as
its layer begins, and back while the layer above it runs backward, so that the copy is there when it is needed. The device then holds the
inputs of `HELD` layers instead of all. A copy has the bits of the original, so losses and gradients are the same bit for bit.
The hooks are torch's for saved tensors, around the checkpoint of each layer, which saves the arguments of the layer and nothing else.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from llamahome.model.backends.backend import Offloaded, OffloadStore
from llamahome.model.load import decoder_layers
from llamahome.model.precision import Precision

HELD = 3
"""Inputs on the device at a time: the one in use, and one that is copied in each direction."""
_CHECKPOINT = "_gradient_checkpointing_func"
"""The attribute in which transformers stores torch's checkpoint on each layer."""


class _Entry:
    """An input that was moved."""

    def __init__(self, offloaded: Offloaded, before: "_Entry | None") -> None:
        self.offloaded = offloaded
        self.before = None if before is None else weakref.ref(before)
        """The one moved before it, which the backward pass needs next; weak, because a pass may end without its backward pass."""


class ActivationOffload:
    """Moves tensors to a store in the order of a forward pass, and back in the opposite order, each one ahead of its use."""

    def __init__(self, store: OffloadStore) -> None:
        self.moved_bytes = 0
        """Of all passes so far."""
        self._store = store
        self._last: weakref.ref[_Entry] | None = None

    def pack(self, x: Tensor) -> _Entry:
        """Begin to move `x`."""
        entry = _Entry(self._store.store(x.detach()), None if self._last is None else self._last())
        self._last = weakref.ref(entry)
        self.moved_bytes += x.nbytes
        return entry

    def unpack(self, entry: _Entry) -> Tensor:
        """The tensor on the device; the one that was moved before it is now on its way."""
        x = entry.offloaded.load()
        before = None if entry.before is None else entry.before()
        if before is not None:
            before.offloaded.fetch()
        return x

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """`checkpoint`, a function like torch's, whose first argument after the function is moved; other arguments stay."""

        def run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            moved = _identity(args[0]) if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None

            def pack(x: Tensor) -> Any:  # autograd keeps this function as long as the input, so it must not hold the tensor
                return self.pack(x) if _identity(x) == moved else x

            def unpack(kept: Any) -> Tensor:
                return self.unpack(kept) if isinstance(kept, _Entry) else kept

            with saved_tensors_hooks(pack, unpack):
                return checkpoint(function, *args, **options)

        return run


def _identity(x: Tensor) -> tuple[int, torch.Size]:
    return x.data_ptr(), x.shape


def offload_inputs(model: PreTrainedModel, store: OffloadStore) -> ActivationOffload | None:
    """Move the inputs of the layers of `model` to `store` between the passes; None if its layers are not recomputed.

    Call it after `place`, with gradient checkpointing.
    """
    layers = [layer for layer in decoder_layers(model) if hasattr(layer, _CHECKPOINT)]
    if not layers:
        return None
    offload = ActivationOffload(store)
    for layer in layers:
        setattr(layer, _CHECKPOINT, offload.around(getattr(layer, _CHECKPOINT)))
    return offload


def input_bytes(model: PreTrainedModel, tokens: int, precision: Precision) -> int:
    """Bytes of the inputs of all layers in a pass of `tokens`: what the store holds."""
    text = model.config.get_text_config()
    return int(text.num_hidden_layers * tokens * text.hidden_size * precision.storage.itemsize)


def spared_bytes(model: PreTrainedModel, tokens: int, precision: Precision) -> int:
    """Bytes of the inputs that the device does not hold."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    return input_bytes(model, tokens, precision) * max(0, layers - HELD) // layers
