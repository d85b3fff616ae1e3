"""Decide how a model fits into memory, and prepare it for training: strategy, tokens of a pass, activation checkpointing.

Replicated weights cost one exchange of gradients per step. Sharded weights are sent at least twice in every micro-batch, so sharding is
only worth it if replicated weights do not fit; with adapters, the frozen base decides. Gradients of sharded weights are sent once per step
if unsharded gradients fit in memory between passes, else after every pass (docs/decisions/0009-placement.md).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from llamahome.config.optimizers import STATE_BYTES
from llamahome.distributed.world import World
from llamahome.model.limits import shapes_of
from llamahome.units import show_bytes

Strategy = Literal["replicate", "shard", "hybrid"]
_WEIGHTS_SHARE = 0.7
"""Share of the free memory for weights, gradients and optimizer state; the rest is for activations."""
_FULL_BYTES = 16
"""Bytes of a weight, its gradient and two moments in float32, as AdamW has them, which alone trains sharded weights."""
_GRADIENT_BYTES = 4
LARGEST_SHARE = 0.7
"""Share of the free memory that activations may take; if they need more, they are recomputed."""


@dataclass(frozen=True)
class ChosenStrategy:
    """A strategy and the reason for it."""

    strategy: Strategy
    reason: str
    sums_each_pass: bool = False
    """Whether gradients of sharded weights are summed after every pass, because unsharded gradients do not fit in memory."""


def count_weights(folder: Path) -> int:
    """The number of weights in the .safetensors files of a folder, from their headers."""
    return sum(math.prod(shape) for shape in shapes_of(folder).values())


def weight_bytes(weights: int, *, method: str, storage: torch.dtype, optimizer: str = "adamw") -> int:
    """Bytes of `weights` with, in full fine-tuning, their gradients and the state of the optimizer. Adapters are not counted."""
    return round(weights * (8 + STATE_BYTES[optimizer])) if method == "full" else weights * storage.itemsize


def shards_of(strategy: Strategy, world: World) -> int:
    """Among how many processes the weights are divided."""
    return {"replicate": 1, "shard": world.size, "hybrid": world.local_size}[strategy]


def choose_strategy(wanted: str, *, method: str, needed: int, free: int, world: World) -> ChosenStrategy:
    """Resolve distributed.strategy, if replicated weights need `needed` bytes on a process that has `free` bytes."""
    chosen = _choose(wanted, method=method, needed=needed, free=free, world=world)
    if chosen.strategy == "replicate" or method != "full":
        return chosen
    return replace(chosen, sums_each_pass=sums_each_pass(chosen.strategy, needed=needed, free=free, world=world))


def sums_each_pass(strategy: Strategy, *, needed: int, free: int, world: World) -> bool:
    """Whether unsharded float32 gradients do not fit beside the shards of weights, gradients and moments in full fine-tuning."""
    shards = world.size if strategy == "shard" else world.local_size
    return needed / shards + needed * _GRADIENT_BYTES / _FULL_BYTES > _WEIGHTS_SHARE * free


def _choose(wanted: str, *, method: str, needed: int, free: int, world: World) -> ChosenStrategy:
    machines = world.size // world.local_size
    if world.size == 1:
        return ChosenStrategy("replicate", "one process holds all weights")
    if wanted == "hybrid" and machines == 1:
        return ChosenStrategy("shard", "hybrid on one machine is shard")
    if wanted in ("replicate", "shard", "hybrid"):
        return ChosenStrategy(wanted, "as set")  # type: ignore[arg-type]
    needs = f"{method} needs {show_bytes(needed)} per process for whole weights"
    room = f"{show_bytes(free)} are free"
    if needed <= _WEIGHTS_SHARE * free:
        return ChosenStrategy("replicate", f"{needs}, {room}")
    if machines > 1 and needed <= _WEIGHTS_SHARE * free * world.local_size:
        return ChosenStrategy("hybrid", f"{needs}, {room}; the {world.local_size} processes of a machine hold them together")
    return ChosenStrategy("shard", f"{needs}, {room}; {world.size} processes hold them together")


def needs_checkpointing(kept_bytes: int, *, free_bytes: int) -> bool:
    """Resolve `training.gradient_checkpointing: auto` for a micro-batch that stores `kept_bytes` of activations in `free_bytes`."""
    return kept_bytes > LARGEST_SHARE * free_bytes


def largest_pass(most: int, *, fewest: int, keeps: Callable[[int], int], free_bytes: int) -> int:
    """The tokens of a pass by default: `most`, halved until activations fit; `most` again if they do not fit in `fewest` tokens.

    `keeps` returns the bytes of activations for a number of tokens. Smaller passes cost a few percent, recomputing activations a third.
    """
    tokens = most
    while needs_checkpointing(keeps(tokens), free_bytes=free_bytes):
        if tokens // 2 < fewest:
            return most
        tokens //= 2
    return tokens


def longest_pass(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest number of tokens up to `most` that `fits`, which is true up to some number; 0 if none does."""
    fitting, failing = 0, most + 1
    while failing - fitting > 1:
        tokens = (fitting + failing) // 2
        fitting, failing = (tokens, failing) if fits(tokens) else (fitting, tokens)
    return fitting


def place(model: PreTrainedModel, *, world: World, checkpointing: bool, sync_batch_norm: bool) -> list[str]:
    """Prepare the model for training, in place; returns lines for the user."""
    lines = []
    model.train()
    if checkpointing:
        with warnings.catch_warnings():  # the only name in transformers 5.20, deprecated in later versions
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated", category=FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True})
    if sync_batch_norm:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            lines.append("distributed.sync_batch_norm: batch normalization runs over all processes")
        else:
            lines.append("distributed.sync_batch_norm: this model has no batch normalization, nothing to do")
    return lines


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, each once, in the order of the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
