"""Memory that runs out: how it is recognised, and with what all ranks do the step or the evaluation again."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llamahome.distributed.devices import is_out_of_memory
from llamahome.distributed.world import World
from llamahome.errors import OutOfMemory, Problem
from llamahome.training.optimizer import allocate_moments


@dataclass(frozen=True)
class RanOut:
    """Memory ran out in a pass of some rank; no weight has changed."""

    message: str | None
    """Of the error on this rank; None when memory ran out on another rank."""
    others_wait: bool = False
    """Whether other ranks wait for this one within a pass, so that nothing can be done again."""


def free_cached_memory() -> None:
    """Give back what the allocators of the accelerator and of the C library keep; its sizes did not fit, and the step is done again."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # of glibc; else freed memory still counts as used where memory is watched
        trim(0)


def update_weights(optimizer: torch.optim.Optimizer) -> str | None:
    """`optimizer.step()`; if memory runs out before a weight has changed, once more after cached memory was freed.

    The gradients are summed by then, so other ranks need not know. Returns what the first error said; None if there was none.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    try:
        allocate_moments(optimizer)
        before = _versions(optimizer, weights)
        optimizer.step()
        return None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or ("before" in locals() and _versions(optimizer, weights) != before):
            raise
        message = str(error) or "no more memory"
    free_cached_memory()  # outside of the handler, because the error holds what was allocated
    allocate_moments(optimizer)
    optimizer.step()
    return message


def _versions(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> int:
    """Grows whenever a weight or its count of updates changes in place."""
    return sum(weight._version + optimizer.state[weight]["step"]._version for weight in weights if weight in optimizer.state)


def _half_as_long(longest: int) -> str:
    return f"data.max_length={max(16, longest // 2)}"


@dataclass(frozen=True)
class Remedies:
    """Which settings let a pass of a run take less memory."""

    recompute: bool = False
    """Whether the pass keeps activations for a backward pass, which could be recomputed."""
    shorten: Callable[[int], str] = _half_as_long
    """The setting with which a row of so many tokens has half of them at most."""


USUAL = Remedies()
"""Of a pass without a backward pass."""


@dataclass(frozen=True)
class SmallerBudget:
    """With what a step is done again."""

    micro_batch_tokens: int
    ranks: list[int]
    """Ranks whose memory ran out."""


def smaller_budget(
    message: str | None,
    micro_batch_tokens: int,
    lengths: Sequence[Sequence[int]],
    *,
    world: World,
    others_wait: bool = False,
    remedies: Remedies = USUAL,
) -> SmallerBudget:
    """Agree on the tokens per micro-batch with which all ranks do a step again; `lengths` are those of the documents of this rank.

    `message` is that of the error on this rank, None when memory ran out on another one. The new budget is half of the largest
    micro-batch that holds more than one document, and fits all ranks. All ranks call it, unless `others_wait` in a pass for this rank:
    then nothing can be done again. Raises OutOfMemory, which names the rank and the `remedies`, on all ranks that called.
    """
    mine: dict[str, Any] = {}
    if message is not None:
        halves = [sum(documents) // 2 for documents in lengths if len(documents) > 1]
        budget = max(1, min(micro_batch_tokens // 2, max(halves, default=0)))
        if halves:
            mine["budget"] = budget
        if others_wait or not halves:
            longest = max((max(documents, default=0) for documents in lengths), default=0)
            if halves:
                tried, setting = f"a micro-batch of up to {micro_batch_tokens:,} tokens", f"training.micro_batch_tokens={budget}"
            else:
                tried, setting = f"a single example of {longest:,} tokens", remedies.shorten(longest)
            mine["problem"] = asdict(_does_not_fit(message, tried, setting, recompute=remedies.recompute, world=world))
    answers = [mine] if others_wait else world.gather(mine)
    problems = [answer["problem"] for answer in answers if "problem" in answer]
    if problems:
        raise OutOfMemory(Problem(**problems[0]))
    return SmallerBudget(min(answer["budget"] for answer in answers if answer), [rank for rank, answer in enumerate(answers) if answer])


def _does_not_fit(message: str, tried: str, setting: str, *, recompute: bool, world: World) -> Problem:
    same_result = "--set training.gradient_checkpointing=true (the result stays the same), or " if recompute else ""
    where = f" into the memory of process {world.rank}" if world.size > 1 else ""
    return Problem(
        code="training.out-of-memory",
        message=f"{tried} does not fit{where}: {message.splitlines()[0][:160]}",
        where=setting.split("=")[0],
        hint=f"{same_result}--set {setting}",
    )


def update_does_not_fit(error: BaseException, *, world: World) -> OutOfMemory:
    """The error to raise when memory runs out while gradients are summed or weights updated, where smaller micro-batches do not help."""
    cause = (str(error).splitlines() or ["no more memory"])[0]
    where = f" of process {world.rank}" if world.size > 1 else ""
    message = f"gradients and optimizer do not fit into the memory{where} beside the weights: {cause[:160]}"
    hint = f"--method lora (or a smaller lora.rank), or --world-size {2 * world.size} --set distributed.strategy=shard"
    return OutOfMemory(Problem(code="training.out-of-memory", message=message, where="training.method", hint=hint))
