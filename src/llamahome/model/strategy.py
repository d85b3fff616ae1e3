"""Whether weights are whole on every process or sharded, from what they need and what is free. Pure.

Whole weights cost one exchange of gradients per step. Sharded ones are sent twice or more in every micro-batch, so they are only worth it
where whole ones do not fit: for adapters the frozen base is what counts. Gradients of sharded weights are sent once per step where whole
ones fit between its passes, else after every pass (docs/decisions/0009-placement.md).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llamahome.distributed.world import World
from llamahome.model.limits import shapes_of
from llamahome.units import show_bytes

Strategy = Literal["replicate", "shard", "hybrid"]
_LARGEST_SHARE = 0.7
"""Of the free memory that weights, gradients and optimizer may take; the rest is for activations."""
_FULL_BYTES = 16
"""A weight, its gradient and two moments in float32."""
_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Chosen:
    """A strategy and why."""

    strategy: Strategy
    reason: str
    sums_each_pass: bool = False
    """Whether gradients of sharded weights are summed after every pass, because whole ones would not fit until the last."""


def count_weights(folder: Path) -> int:
    """Numbers in the .safetensors files of a model folder, from their headers."""
    return sum(math.prod(shape) for shape in shapes_of(folder).values())


def weight_bytes(weights: int, *, method: str, storage: torch.dtype) -> int:
    """Memory for `weights` and what training adds to them; adapters are left out, they are below a few percent."""
    return weights * (_FULL_BYTES if method == "full" else storage.itemsize)


def choose_strategy(wanted: str, *, method: str, needed: int, free: int, world: World) -> Chosen:
    """What distributed.strategy comes to; `needed` bytes for whole weights on a process that has `free`."""
    chosen = _choose(wanted, method=method, needed=needed, free=free, world=world)
    if chosen.strategy == "replicate" or method != "full":
        return chosen
    return replace(chosen, sums_each_pass=sums_each_pass(chosen.strategy, needed=needed, free=free, world=world))


def sums_each_pass(strategy: Strategy, *, needed: int, free: int, world: World) -> bool:
    """Whether rows of weights, gradients and moments leave no room for whole gradients in float32; full fine-tuning, sharded."""
    shards = world.size if strategy == "shard" else world.local_size
    return needed / shards + needed * _GRADIENT_BYTES / _FULL_BYTES > _LARGEST_SHARE * free


def _choose(wanted: str, *, method: str, needed: int, free: int, world: World) -> Chosen:
    machines = world.size // world.local_size
    if world.size == 1:
        return Chosen("replicate", "one process holds all weights")
    if wanted == "hybrid" and machines == 1:
        return Chosen("shard", "hybrid on one machine is shard")
    if wanted in ("replicate", "shard", "hybrid"):
        return Chosen(wanted, "as set")  # type: ignore[arg-type]
    whole = f"{method} needs {show_bytes(needed)} per process for whole weights"
    room = f"{show_bytes(free)} are free"
    if needed <= _LARGEST_SHARE * free:
        return Chosen("replicate", f"{whole}, {room}")
    if machines > 1 and needed <= _LARGEST_SHARE * free * world.local_size:
        return Chosen("hybrid", f"{whole}, {room}; the {world.local_size} processes of a machine hold them together")
    return Chosen("shard", f"{whole}, {room}; {world.size} processes hold them together")
