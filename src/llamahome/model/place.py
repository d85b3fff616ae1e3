"""Where and how a model sits: activation checkpointing, batch normalization over processes, equal weights on all ranks.

Called once before the loop, in this order; the loop does not know. Gradients are *summed* over ranks by distributed/world.py.
"""

import warnings
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from llamahome.distributed.world import World

LARGEST_SHARE = 0.7
"""Of the free memory that activations may take before they are recomputed instead."""


def needs_checkpointing(kept_bytes: int, *, free_bytes: int) -> bool:
    """What training.gradient_checkpointing auto comes to for micro-batches that keep so much; nothing else will take `free_bytes`."""
    return kept_bytes > LARGEST_SHARE * free_bytes


def largest_pass(most: int, *, fewest: int, keeps: Callable[[int], int], free_bytes: int) -> int:
    """Tokens of a pass when nobody says: `most`, or a half or a quarter of it, as long as at least `fewest`, if only then nothing has to be
    recomputed. `keeps` gives the bytes that a pass of so many tokens keeps. Recomputing costs a third more, smaller passes a few percent.
    """
    tokens = most
    while needs_checkpointing(keeps(tokens), free_bytes=free_bytes):
        if tokens // 2 < fewest:
            return most
        tokens //= 2
    return tokens


def place(model: PreTrainedModel, *, world: World, checkpointing: bool, sync_batch_norm: bool) -> list[str]:
    """Prepare the model in place for training; returns lines that tell what was done or was not needed."""
    told = []
    model.train()
    if checkpointing:
        with warnings.catch_warnings():  # transformers 5.20 knows no other name for it; later ones warn of this one
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated", category=FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True})
    if sync_batch_norm:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            told.append("distributed.sync_batch_norm: batch normalization runs over all processes")
        else:
            told.append("distributed.sync_batch_norm: this model has no batch normalization, nothing to do")
    return told


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that learns, each once, in the order of the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
