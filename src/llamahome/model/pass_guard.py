"""Passes of a sharded model that end on every rank at the same collective, also on a rank whose memory runs out within one.

Ranks gather the weights of each layer together, so a rank that leaves a pass would leave the others waiting. Here, each layer and the whole
pass catch memory that runs out, forward and backward. From then on this rank computes nothing in the step: layers hand their input on, so
FSDP's hooks around them still take part in every collective. What is summed is meaningless; the ranks learn that with the sums, and do the
step again in smaller micro-batches. Where memory runs out in FSDP's hooks themselves, for the weights of a layer that is gathered or for
gradients that are sent, the activations of this rank are given up, which makes room for them.
Cost: none in arithmetic. Each layer's backward runs in an autograd call of its own, as with reentrant activation checkpointing.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llamahome.distributed.devices import is_out_of_memory

T = TypeVar("T")


class PassGuard:
    """Runs passes of one sharded model. `message` says how memory ran out on this rank since the last `take`."""

    def __init__(self, root: Callable[[Callable[[], Any]], Any], layers: Sequence[nn.Module], *, device: torch.device, whole: bool) -> None:
        """`root` runs a function inside FSDP's root module, `whole` says that all weights are trained. Changes the layers' forward."""
        self.message: str | None = None
        self._root, self._layers, self._device, self._whole = root, list(layers), device, whole
        self._entered = False
        """Whether the pass has begun, in which ranks wait for each other."""
        self._done = 0
        """Layers that this pass has run."""
        self._hidden: Tensor | None = None
        """What the last of them returned."""
        self._kept: weakref.WeakSet[_Inner] = weakref.WeakSet()
        """The graphs of the layers of this pass that are still there."""
        self._plain = False
        """Whether the layers return something else than hidden states, and are left as they are."""
        for layer in self._layers:
            layer.forward = self._guarded(layer.forward)

    def take(self) -> str | None:
        """The message, which is then forgotten; called when a step or an evaluation ends."""
        message, self.message, self._hidden = self.message, None, None
        return message

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """`work()`, which runs one pass, or a pass without arithmetic if memory has run out or runs out before the pass begins."""
        if self.message is None:
            self._entered = False
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if self._entered:
                    raise  # the other ranks wait within the pass
                self.note(error)
        return self.within(self._nothing, lambda hidden: hidden.sum() * 0)

    def within(self, work: Callable[[], T], otherwise: Callable[[Tensor], T] | None = None, /) -> T:
        """`work()` with the root's weights gathered. If memory runs out in it, the value of `otherwise` for what the layers hand on."""
        self._entered, self._done, self._hidden = True, 0, None
        result: T
        if otherwise is None:
            result = self._root(work)
            return result

        def guarded() -> T:
            if self.message is None:
                try:
                    return work()
                except (MemoryError, RuntimeError) as error:
                    self.note(error)
            return otherwise(self._rest())

        result = self._root(guarded)
        return result

    def allocating(self, make: Callable[[], T]) -> T:
        """`make()`, which allocates memory that this rank needs to take part in a collective.

        If memory runs out, once more after what the pass has kept was given up. Raises the error if that does not help.
        """
        try:
            return make()
        except (MemoryError, RuntimeError) as error:
            self.note(error)
        for inner in list(self._kept):  # outside of the handler, because the error holds what was allocated
            inner.result = None
        return make()

    @staticmethod
    def _nothing() -> Tensor:
        raise MemoryError

    def _rest(self) -> Tensor:
        """The layers that this pass has not run yet, without arithmetic."""
        none = torch.zeros(1, 1, 1, device=self._device, requires_grad=self._whole)  # like the embedding's, or hooks run in another order
        hidden = self._hidden if self._hidden is not None else none
        for layer in self._layers[self._done :]:
            hidden = layer(hidden)
        return hidden

    def note(self, error: BaseException) -> None:
        """Remember that memory ran out; raises every other error."""
        if self.message is None and not is_out_of_memory(error):  # else it ran out while activations were computed again
            raise error
        self.message = self.message or str(error) or "no more memory"  # a MemoryError of Python has no message

    def _guarded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def layer(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
            self._done += 1
            if self._plain or any(each.requires_grad for each in _tensors((arguments, options))):
                return forward(hidden, *arguments, **options)
            inner, outer = hidden.detach().requires_grad_(hidden.requires_grad), hidden
            result: Any = None
            if self.message is None:
                try:
                    result = forward(inner, *arguments, **options)
                except (MemoryError, RuntimeError) as error:
                    self.note(error)
                else:
                    self._plain = not isinstance(result, Tensor)
                    if self._plain:
                        return forward(hidden, *arguments, **options)
            if torch.is_grad_enabled():
                start = torch.zeros((), device=hidden.device, requires_grad=True)  # or a layer above frozen ones had no backward
                kept = _Inner(inner, result, self)
                self._kept.add(kept)
                result = _Join.apply(outer, start, kept)  # type: ignore[no-untyped-call]
            self._hidden = outer if result is None else result
            return self._hidden

        return layer


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


@dataclass(eq=False)
class _Inner:
    """The graph of a layer; in an object, because autograd would follow a tensor."""

    start: Tensor
    result: Tensor | None
    """None if memory ran out."""
    guard: PassGuard


class _Join(torch.autograd.Function):
    """Joins the graph of a layer, which is its own, to the graph of the pass."""

    @staticmethod
    def forward(ctx: Any, outer: Tensor, start: Tensor, inner: _Inner) -> Tensor:
        del start
        ctx.inner = inner
        return outer.view_as(outer) if inner.result is None else inner.result.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), inner, ctx.inner = gradients, ctx.inner, None
        if inner.result is not None and inner.result.requires_grad and inner.guard.message is None:  # or nothing in it or below is trained
            try:
                torch.autograd.backward(inner.result, gradient)
            except (MemoryError, RuntimeError) as error:
                inner.guard.note(error)
        if not inner.start.requires_grad:
            return None, None, None
        return (inner.start.grad if inner.start.grad is not None else gradient), None, None
