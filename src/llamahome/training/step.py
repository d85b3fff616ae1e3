"""One optimizer update over one global batch.

The loss is the sum over all targets of all ranks divided by their number, counted before the first backward pass, so any cut into
micro-batches or ranks gives the same gradient up to rounding. An update whose loss or gradient is not finite is refused on the device,
without waiting for it: the optimizer skips when `found_inf` is set. Nothing here reads a value of a GPU back. When memory runs out in a
pass of any process, all of them learn it with the gradients, and nothing is updated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamahome.data.records import Microbatch
from llamahome.distributed.exchange import Exchange
from llamahome.distributed.world import World
from llamahome.monitoring.throughput import PartClock
from llamahome.training.recovery import exhausted

_MIX = 0x9E3779B97F4A7C15
"""2^64 / golden ratio: spreads (seed, step, micro-batch) over seeds, as in SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""


@dataclass(frozen=True)
class StepResult:
    """Device scalars of one step, equal on all ranks."""

    loss: Tensor
    """() float32, nats per target."""
    grad_norm: Tensor
    """() float32, global L2 norm before clipping."""
    refused: Tensor
    """() float32, 1 when the update was not applied."""


@dataclass(frozen=True)
class RanOut:
    """Memory ran out in a pass of some process; no weight has changed. Where passes wait for each other, only that process knows."""

    told: str | None
    """What this process was told; None when it was another one."""


def dropout_seed(seed: int, step: int, index: int) -> int:
    """Seed of everything random inside micro-batch `index` of `step`: derived, never carried along."""
    return ((seed * _MIX + step) * _MIX + index) & 0x7FFF_FFFF_FFFF_FFFF


def train_step(
    objective: Callable[[Microbatch], Tensor],
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Microbatch],
    *,
    num_targets: int,
    seeds: Sequence[int],
    max_grad_norm: float | None,
    exchange: Exchange,
    clock: PartClock,
) -> StepResult | RanOut:
    """Update the weights once. `num_targets` counts the targets of all ranks; a rank without micro-batches takes part all the same.

    Without a target on any rank, because all rows of the step were left out, nothing changes: neither weights nor optimizer.
    """
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    loss = torch.zeros((), dtype=torch.float32, device=exchange.world.device)
    if num_targets == 0:
        return StepResult(loss, loss, loss)
    told = None
    try:
        _passes(loss, objective, microbatches, num_targets=num_targets, seeds=seeds, exchange=exchange, clock=clock)
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        told = str(error) or "no more memory"  # Python's own says nothing
    if told is not None:  # outside of the handler: the error holds on to all that the pass has kept
        optimizer.zero_grad(set_to_none=True)
        if exchange.passes_wait:
            return RanOut(told)
    with clock.part("exchange"):
        summed = exchange.finish(loss, gave_up=told is not None)
        if _anybody(exchange.world, summed.gave_up, mine=told is not None):
            optimizer.zero_grad(set_to_none=True)
            return RanOut(told)
    loss, grad_norm = summed.loss, summed.grad_norm
    with clock.part("update"):
        refused = 1.0 - (torch.isfinite(loss) & torch.isfinite(grad_norm)).float()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
        optimizer.found_inf = refused  # type: ignore[attr-defined]  # what torch's GradScaler sets, too
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, refused)


def _anybody(world: World, gave_up: Tensor, *, mine: bool) -> bool:
    """Whether a process gave up. Reading it from a GPU would wait for all that is queued there: then it travels once more, over gloo."""
    if world.size == 1:
        return mine
    return float(gave_up) > 0 if gave_up.device.type == "cpu" else world.any(mine)


def _passes(
    loss: Tensor,
    objective: Callable[[Microbatch], Tensor],
    microbatches: Sequence[Microbatch],
    *,
    num_targets: int,
    seeds: Sequence[int],
    exchange: Exchange,
    clock: PartClock,
) -> None:
    """Forward and backward of every micro-batch of this rank; adds its share of the loss to `loss`."""
    for number, (microbatch, seed) in enumerate(zip(microbatches, seeds, strict=True), start=1):
        torch.manual_seed(seed)
        with clock.part("forward"):
            share = objective(microbatch) / num_targets
        with clock.part("backward"):
            exchange.before_backward(last=number == len(microbatches))
            share.backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
