"""Where and how a model sits: activation checkpointing, batch normalization over processes, equal weights on all ranks.

Called once before the loop, in this order; the loop does not know. Gradients are *summed* over ranks by distributed/world.py.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from llamahome.distributed.world import World

_KEPT_PER_LAYER_HIDDEN = 34
_KEPT_PER_LAYER_INNER = 10
"""measured: bytes that one token keeps per layer without checkpointing, per unit of hidden size and of feed-forward size in 2-byte types
(docs/log.md); twice that in float32."""
_LARGEST_SHARE = 0.7
"""Of the free memory that activations may take before they are recomputed instead."""


def activation_bytes(model: PreTrainedModel, tokens: int, *, compute: torch.dtype) -> int:
    """Estimated memory that a forward pass over `tokens` keeps for the backward pass without checkpointing."""
    config = model.config.get_text_config()
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = torch.finfo(compute).bits // 16
    return int(tokens * config.num_hidden_layers * (_KEPT_PER_LAYER_HIDDEN * hidden + _KEPT_PER_LAYER_INNER * inner) * width)


def needs_checkpointing(wanted: bool | str, model: PreTrainedModel, tokens: int, *, compute: torch.dtype, free_bytes: int) -> bool:
    """Resolve training.gradient_checkpointing for micro-batches of `tokens`."""
    if isinstance(wanted, bool):
        return wanted
    return activation_bytes(model, tokens, compute=compute) > _LARGEST_SHARE * free_bytes


def place(model: PreTrainedModel, *, world: World, checkpointing: bool, sync_batch_norm: bool) -> list[str]:
    """Prepare the model in place for training; returns lines that tell what was done or was not needed."""
    told = []
    model.train()
    if checkpointing:
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
