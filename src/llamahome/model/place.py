"""Where and how a model sits: activation checkpointing, batch normalization over processes, equal weights on all ranks.

Called once before the loop, in this order; the loop does not know. Gradients are *summed* over ranks by distributed/world.py.
"""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.distributed.world import World
from llamahome.model.attention import QUERY_BLOCK
from llamahome.model.backends.cpu.fuse import keeps_little
from llamahome.model.backends.cpu.native import has_compiler
from llamahome.model.precision import Precision

_KEPT_PER_HIDDEN, _KEPT_PER_INNER = 18, 8
"""Bytes that one token keeps per layer without checkpointing or compiled passes, per unit of hidden and of feed-forward size. measured:
22.3 KB a token and layer at 576 and 1,536 in bfloat16 (docs/log.md); 1.6 times that under autocast and 1.8 times in float32."""
LARGEST_SHARE = 0.7
"""Of the free memory that activations may take before they are recomputed instead."""


def makes_again(config: Config, precision: Precision) -> bool:
    """Whether norms and gates will be made again in the backward pass, where cpu/fuse.py finds layers of its form; judged beforehand."""
    settled = config.training.method == "full" or not (config.lora.dropout or config.lora.use_dora)
    fits = settled and precision.autocast == (config.training.method == "full")
    return fits and config.training.compile is not False and has_compiler()


def activation_bytes(
    model: PreTrainedModel, tokens: int, *, longest: int, precision: Precision, backend: str = "blocks", again: bool = False
) -> int:
    """Estimated memory that a forward pass over `tokens` in documents of up to `longest` keeps for the backward pass.

    torch's own kernel, which the `sdpa` back end calls, and `tiled` passes make the probabilities again; the others keep them.
    `again` is what `makes_again` said: then a layer keeps two states, queries, keys, values and what becomes of them, and both halves of
    the gate; one layer more stands for gradients on their way.
    """
    config = model.config.get_text_config()
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads, low = config.num_attention_heads, precision.compute == torch.bfloat16
    probabilities = 0.0 if backend in ("sdpa", "tiled") else heads * (longest / 2 + QUERY_BLOCK / 2) * (2 if low else 4)
    if again and keeps_little(model):
        size = getattr(config, "head_dim", None) or hidden // heads
        attention = 2 * size * (heads + config.num_key_value_heads)
        layer = 2 * hidden * precision.storage.itemsize + (attention + 2 * inner) * precision.compute.itemsize
        return int(tokens * (config.num_hidden_layers * (layer + probabilities) + layer))
    width = (1.6 if precision.autocast else 1.0) if low else 1.8
    return int(tokens * config.num_hidden_layers * (width * (_KEPT_PER_HIDDEN * hidden + _KEPT_PER_INNER * inner) + probabilities))


def needs_checkpointing(kept_bytes: int, *, free_bytes: int) -> bool:
    """What training.gradient_checkpointing auto comes to for micro-batches that keep so much; nothing else will take `free_bytes`."""
    return kept_bytes > LARGEST_SHARE * free_bytes


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
