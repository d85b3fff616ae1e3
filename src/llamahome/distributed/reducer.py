"""Sums the gradients of a step over all processes, if every process holds all trained weights; once per step.

Two strategies with the same result: one flat collective after the last backward pass (few weights: adapters), or buckets while the last
backward pass still runs (many weights). model/shard.py has a third one, for processes that hold only rows of the weights.
A process that could not compute its share still takes part and says so next to the loss, so that all know before the update.
Source: buckets in the order of the backward pass, PyTorch DDP (Li et al., VLDB 2020). docs/decisions/0020 says why DDP itself is not used.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llamahome.distributed.world import World, flatten_gradients

BUCKET_BYTES = 25 * 2**20
"""Size of a bucket; the default of PyTorch's DDP."""
_CHUNK = 1 << 14
"""Elements of a gradient that are squared at a time on a CPU, because their float64 copy (128 KiB) stays in its cache."""


@dataclass(frozen=True)
class Summed:
    """The sums of a step over all processes."""

    loss: Tensor
    grad_norm: Tensor
    """L2 norm of the summed gradient."""
    gave_up: Tensor
    """() float32, the number of processes that could not compute their share; unless it is 0, gradients and loss are meaningless."""
    measured: Tensor
    """[M] float32, what came behind the loss."""


class Guard(Protocol):
    """Lets a pass in which processes wait for each other end also where memory runs out."""

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """The loss of a pass; meaningless if memory has run out."""

    def take(self) -> str | None:
        """How memory ran out since the last call; None if it did not."""


class Unguarded:
    """For passes in which no process waits for another: memory that runs out is an error."""

    def __init__(self) -> None:
        """`run` calls its argument without a frame of its own."""
        self.run: Callable[[Callable[[], Tensor]], Tensor] = operator.call

    def take(self) -> str | None:
        """None."""
        return None


UNGUARDED = Unguarded()


class Reducer(Protocol):
    """Sums the gradients and the loss of a step."""

    @property
    def guard(self) -> Guard:
        """Runs the passes."""

    @property
    def world(self) -> World:
        """The processes that take part."""

    @property
    def collective_in_forward(self) -> bool:
        """Whether passes contain collectives, so that a process that gives up within a pass leaves the others waiting."""

    def before_backward(self, *, last: bool) -> None:
        """Call it before each backward pass of this process; `last` if it is the last one of the step."""

    def finish(self, loss: Tensor, *, gave_up: bool = False) -> Summed:
        """Replace the gradients by their sums over all processes. `loss` is () or [1 + M]: what lies behind the loss is summed, too.

        All processes call it once per step, also one without a backward pass and one that `gave_up`. It does not wait for the device.
        """


class FlatReducer:
    """One collective per dtype after the last backward pass; the loss travels with the gradients."""

    def __init__(self, world: World, parameters: Sequence[nn.Parameter], *, guard: Guard = UNGUARDED) -> None:
        """`guard` is given if passes contain collectives."""
        self.world, self.guard, self.collective_in_forward = world, guard, guard is not UNGUARDED
        self._parameters = list(parameters)

    def before_backward(self, *, last: bool) -> None:
        """Does nothing."""

    def finish(self, loss: Tensor, *, gave_up: bool = False) -> Summed:
        """See Reducer."""
        sums = _flag_and_loss(loss, gave_up)
        extra = nn.Parameter(torch.zeros_like(sums))
        extra.grad = sums
        self.world.sum_gradients_([*self._parameters, extra])
        return Summed(extra.grad[1], total_norm(self._parameters), extra.grad[0], extra.grad[2:])


class OverlappedReducer:
    """Sums gradients in buckets, last layer first, while the last backward pass of this process still computes earlier layers.

    Every process sends the same buckets in the same order, whatever it computes; a missing gradient counts as zeros.
    Memory: one more copy of the gradients of one bucket.
    """

    def __init__(self, world: World, parameters: Sequence[nn.Parameter], *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.world, self.guard, self.collective_in_forward, self._parameters = world, UNGUARDED, False, list(parameters)
        self._buckets = _fill_buckets(self._parameters, bucket_bytes)
        self._bucket_of = {id(each): number for number, bucket in enumerate(self._buckets) for each in bucket}
        self._is_last_pass, self._missing = False, [len(bucket) for bucket in self._buckets]
        self._waits: list[Callable[[], None]] = []
        for each in self._parameters:
            each.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def before_backward(self, *, last: bool) -> None:
        """From the last backward pass on, complete buckets are sent."""
        self._is_last_pass = last

    def finish(self, loss: Tensor, *, gave_up: bool = False) -> Summed:
        """Send the remaining buckets, then wait for all."""
        self._is_last_pass = False
        while len(self._waits) < len(self._buckets):
            self._send_next()
        sums = _flag_and_loss(loss, gave_up)
        self.world.sum_(sums)
        for wait in self._waits:
            wait()
        self._waits, self._missing = [], [len(bucket) for bucket in self._buckets]
        return Summed(sums[1], total_norm(self._parameters), sums[0], sums[2:])

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._is_last_pass:
            return
        self._missing[self._bucket_of[id(parameter)]] -= 1
        while len(self._waits) < len(self._buckets) and not self._missing[len(self._waits)]:
            self._send_next()

    def _send_next(self) -> None:
        self._waits.append(self.world.start_sum_(flatten_gradients(self._buckets[len(self._waits)])))


def _flag_and_loss(loss: Tensor, gave_up: bool) -> Tensor:
    """[2 + M] float32: what is summed besides the gradients."""
    values = loss.detach().reshape(-1)
    return torch.cat([torch.full_like(values[:1], float(gave_up)), values])


def total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """() float32, the L2 norm of all gradients together; it does not depend on how they are split, see `sum_of_squares`."""
    return sum_of_squares([each.grad for each in parameters if each.grad is not None]).sqrt().float()


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """() float64, the sum of the squares of all elements; float32 on MPS, which has no float64. It does not wait for the device.

    Sums in float32 depend on how gradients are split: measured, 3e-4 off for the 28 million elements of the starter's embedding. A float64
    copy of a whole gradient costs more than the sum, so a CPU converts one chunk at a time and a GPU converts inside its kernel.
    measured: 135 million elements on two cores take 0.14 s, in float32 0.03 s; the step that they belong to takes 10 s and more.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    kind = gradients[0].device.type
    if kind == "mps":
        return torch.nn.utils.get_total_norm(gradients).square()
    if kind != "cpu":
        return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum()
    buffer = torch.empty(_CHUNK, dtype=torch.float64)
    sums = [buffer[: chunk.numel()].copy_(chunk).square_().sum() for each in gradients for chunk in torch.split(each.reshape(-1), _CHUNK)]
    return torch.stack(sums).sum()


def _fill_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """The last weights first; the weights of a bucket have one dtype and at most `bucket_bytes`, unless a single weight is larger."""
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
