"""How the gradients of a step come together when every process holds the trained weights whole: summed, once per step.

Two ways with the same result: one flat exchange when all is computed (few weights: adapters), or in buckets while the last backward pass
still computes the rest (many weights). Weights of which a process holds rows alone have a way of their own in model/shard.py.
A process that gave up within its passes takes part all the same and says so beside the loss, so that all know before anything is updated.
Source: buckets in the order of the backward pass are those of PyTorch DDP (Li et al., VLDB 2020).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llamahome.distributed.world import World

BUCKET_BYTES = 25 * 2**20
"""Gradients that travel together while the backward pass goes on; the size that PyTorch's DDP uses."""
_PIECE = 1 << 14
"""Numbers of a gradient that are squared together on a processor: their float64 copy (128 KiB) stays in its cache."""


@dataclass(frozen=True)
class Summed:
    """What came of a step on all processes together."""

    loss: Tensor
    grad_norm: Tensor
    """L2 norm of the summed gradient."""
    gave_up: Tensor
    """() float32, how many processes could not compute their share; gradients and loss mean nothing unless it is 0."""


class Exchange(Protocol):
    """What the step asks of the gradients of all processes."""

    @property
    def world(self) -> World:
        """The processes that take part."""

    @property
    def passes_wait(self) -> bool:
        """Whether processes wait for each other within a pass, so that one that gives up there leaves the others waiting."""

    def before_backward(self, *, last: bool) -> None:
        """A backward pass of this process begins; `last` when it is the last of the step."""

    def finish(self, loss: Tensor, *, gave_up: bool = False) -> Summed:
        """Put the sums over all processes into the gradients.

        Called once per step by all processes, also by one without a backward pass and by one that `gave_up`. Nothing waits for the device.
        """


class FlatExchange:
    """All gradients in one exchange after the last backward pass, with the loss behind them."""

    def __init__(self, world: World, parameters: Sequence[nn.Parameter], *, passes_wait: bool = False) -> None:
        self.world, self.passes_wait, self._parameters = world, passes_wait, list(parameters)

    def before_backward(self, *, last: bool) -> None:
        """Nothing travels before all is computed."""

    def finish(self, loss: Tensor, *, gave_up: bool = False) -> Summed:
        """One exchange for each type of number."""
        carrier = nn.Parameter(torch.zeros(2, device=loss.device))
        carrier.grad = _beside(loss, gave_up)
        self.world.sum_gradients_([*self._parameters, carrier])
        return Summed(carrier.grad[0], total_norm(self._parameters), carrier.grad[1])


class OverlappedExchange:
    """Gradients travel in buckets, last layer first, while the last backward pass of this process computes those before.

    Every process sends the same buckets in the same order, whatever it computes; a weight without a gradient counts as zeros.
    Memory: as much again as the gradients of one bucket.
    """

    def __init__(self, world: World, parameters: Sequence[nn.Parameter], *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.world, self.passes_wait, self._parameters = world, False, list(parameters)
        self._buckets = _fill_buckets(self._parameters, bucket_bytes)
        self._bucket_of = {id(each): number for number, bucket in enumerate(self._buckets) for each in bucket}
        self._armed, self._missing = False, [len(bucket) for bucket in self._buckets]
        self._waits: list[Callable[[], None]] = []
        for each in self._parameters:
            each.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]

    def before_backward(self, *, last: bool) -> None:
        """From the last backward pass on, what is ready is sent."""
        self._armed = last

    def finish(self, loss: Tensor, *, gave_up: bool = False) -> Summed:
        """Send what was not sent yet, then wait for all."""
        self._armed = False
        while len(self._waits) < len(self._buckets):
            self._send()
        told = _beside(loss, gave_up)
        self.world.sum_(told)
        for wait in self._waits:
            wait()
        self._waits, self._missing = [], [len(bucket) for bucket in self._buckets]
        return Summed(told[0], total_norm(self._parameters), told[1])

    def _ready(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        self._missing[self._bucket_of[id(parameter)]] -= 1
        while len(self._waits) < len(self._buckets) and not self._missing[len(self._waits)]:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._waits)]
        flat, start = torch.empty(sum(each.numel() for each in bucket), dtype=bucket[0].dtype, device=bucket[0].device), 0
        for each in bucket:
            view = flat.narrow(0, start, each.numel()).view(each.shape)
            if each.grad is None:
                view.zero_()
            else:
                view.copy_(each.grad)
            each.grad, start = view, start + each.numel()
        self._waits.append(self.world.start_sum_(flat))


def _beside(loss: Tensor, gave_up: bool) -> Tensor:
    """(2,) float32: what is summed besides the gradients."""
    return torch.stack([loss.detach(), torch.full_like(loss, float(gave_up))])


def total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """() float32, the L2 norm of all gradients together; the same for every split of them, see `sum_of_squares`."""
    return sum_of_squares([each.grad for each in parameters if each.grad is not None]).sqrt().float()


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """() float64, the squares of all numbers added up; float32 on MPS, which has nothing wider. Nothing waits for the device.

    Sums in float32 depend on how gradients are cut: measured, 3e-4 off for the 28 million numbers of the starter's embedding. A copy of a
    whole gradient in float64 costs more than the sum, so a processor widens a piece at a time and a GPU widens inside of its kernel.
    measured: 135 million numbers on two cores take 0.14 s, in float32 0.03 s; the step that they belong to takes 10 s and more.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    kind = gradients[0].device.type
    if kind == "mps":
        return torch.nn.utils.get_total_norm(gradients).square()
    if kind != "cpu":
        return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum()
    piece = torch.empty(_PIECE, dtype=torch.float64)
    sums = [piece[: part.numel()].copy_(part).square_().sum() for each in gradients for part in torch.split(each.reshape(-1), _PIECE)]
    return torch.stack(sums).sum()


def _fill_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """The last weights first, each bucket of one type and at most so large, or one weight alone."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for each in reversed(parameters):
        size = each.numel() * each.element_size()
        if not buckets or size > room or each.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(each)
        room -= size
    return buckets
