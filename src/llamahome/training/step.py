"""One optimizer update over one global batch.

The loss is the sum over all units of all ranks (targets, or pairs of answers) divided by their number, counted before the first backward
pass, so any split into micro-batches or ranks gives the same gradient up to rounding. An update whose loss or gradient is not finite, or a
spike, is refused on the device, without waiting for it: the optimizer skips the update when `found_inf` is set. Nothing here reads a value
back from a GPU, but with a loss scale (loss_scale.py) the norm of the gradient.
When a rank runs out of memory in a pass, all ranks learn it with the gradients, and nothing is updated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llamahome.data.records import Microbatch
from llamahome.distributed.devices import is_out_of_memory
from llamahome.distributed.reducer import Reducer
from llamahome.distributed.world import World
from llamahome.monitoring.throughput import PartClock
from llamahome.training.loss_scale import Overflowed
from llamahome.training.memory import RanOut, update_does_not_fit, update_weights
from llamahome.training.spikes import Limits

_MIX = 0x9E3779B97F4A7C15
"""2^64 / golden ratio: spreads (seed, step, micro-batch) over seeds, as in SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""


@dataclass(frozen=True)
class StepResult:
    """Device scalars of one step, equal on all ranks."""

    loss: Tensor
    """() float32, per unit of the objective: nats per target."""
    grad_norm: Tensor
    """() float32, global L2 norm before clipping."""
    refused: Tensor
    """() float32: APPLIED, NOT_FINITE or SPIKE of spikes.py."""
    measured: Tensor
    """[M] float32, the means of what the objective measures besides its loss."""
    short: str | None = None
    """What was said when memory ran out in the update of this rank, which was then done again."""


def step_seed(seed: int, step: int) -> int:
    """Seed of everything random in update number `step`: derived from the seed of the run, never carried along."""
    return seed * _MIX + step


def microbatch_seed(seed_of_step: int, index: int) -> int:
    """Seed of everything random in micro-batch `index` of a step; dropout uses it."""
    return (seed_of_step * _MIX + index) & 0x7FFF_FFFF_FFFF_FFFF


def train_step(
    objective: Callable[[Microbatch], Tensor],
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Microbatch],
    *,
    divisors: Sequence[int],
    seed: int,
    limits: Limits,
    reducer: Reducer,
    clock: PartClock,
) -> StepResult | RanOut | Overflowed:
    """Update the weights once; all ranks call it, also a rank without micro-batches. `seed` is that of the step.

    `objective` gives sums of a micro-batch: its loss, and behind it what else is measured. `divisors` has the number of units over all
    ranks by which each of the sums is divided. If no rank has a unit, because all rows of the step were left out, neither weights nor
    optimizer change. Raises OutOfMemory when memory runs out after the passes.
    """
    loss = torch.zeros(len(divisors), dtype=torch.float32, device=reducer.world.device)
    if divisors[0] == 0:
        return StepResult(loss[0], loss[0], loss[0], loss[1:])
    share, ran_out = loss, None
    try:
        for number, microbatch in enumerate(microbatches, start=1):
            torch.manual_seed(microbatch_seed(seed, microbatch.index))
            with clock.part("forward"):
                share = _divided(reducer.guard.run(partial(objective, microbatch)), divisors)
            with clock.part("backward"):
                reducer.before_backward(last=number == len(microbatches))
                limits.scaled(share[0]).backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ran_out = RanOut(str(error) or "no more memory", reducer.collective_in_forward)  # a MemoryError of Python has no message
    share = loss  # frees the graph of the last pass
    if (message := reducer.guard.take()) is not None:
        ran_out = ran_out or RanOut(message)
    if ran_out is not None:  # outside of the handler, because the error holds everything that the pass has kept
        optimizer.zero_grad(set_to_none=True)
        if ran_out.others_wait:
            return ran_out
    try:
        return _update(loss, optimizer, ran_out, limits=limits, reducer=reducer, clock=clock)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise update_does_not_fit(error, world=reducer.world) from error
        raise


def _divided(sums: Tensor, divisors: Sequence[int]) -> Tensor:
    """[1 + M] from sums of a micro-batch; a pass that ran out of memory has a meaningless loss and nothing behind it."""
    return torch.stack([value / max(1, divisor) for value, divisor in zip(sums.reshape(-1), divisors, strict=False)])


def _update(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    ran_out: RanOut | None,
    *,
    limits: Limits,
    reducer: Reducer,
    clock: PartClock,
) -> StepResult | RanOut | Overflowed:
    """Sum loss and gradients over all ranks, clip, and update the weights unless a rank ran out of memory or the scaled gradient
    overflowed.
    """
    with clock.part("exchange"):
        summed = reducer.finish(loss, gave_up=ran_out is not None)
        if _any_gave_up(reducer.world, summed.gave_up, mine=ran_out is not None):
            optimizer.zero_grad(set_to_none=True)
            return ran_out or RanOut(None)
    with clock.part("update"):
        parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        norm = summed.grad_norm
        if limits.scale is not None:
            if (overflowed := limits.scale.judge(summed.loss, norm)) is not None:
                optimizer.zero_grad(set_to_none=True)
                return overflowed
            norm = limits.scale.unscale(parameters, norm)
            limits.scale.after_update(norm)
        refused = limits.refuse(summed.loss, norm)
        if limits.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limits.max_grad_norm, norm)
        optimizer.found_inf = (refused > 0).float()  # type: ignore[attr-defined]  # torch's GradScaler sets it, too
        short = update_weights(optimizer)
        optimizer.zero_grad(set_to_none=True)
    return StepResult(summed.loss, norm, refused, summed.measured, short)


def _any_gave_up(world: World, gave_up: Tensor, *, mine: bool) -> bool:
    """Whether a rank gave up. Reading `gave_up` from a GPU would wait for all queued work, so the ranks ask each other over gloo there."""
    if world.size == 1:
        return mine
    return float(gave_up) > 0 if gave_up.device.type == "cpu" else world.any(mine)
