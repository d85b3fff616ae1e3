"""Add rows to embedding and output head if the tokenizer has more tokens than the model (model.resize_embeddings).

New rows are initialized with the mean of the old rows. Full fine-tuning trains all rows; with adapters, PEFT trains only the new rows
(trainable tokens) and saves them with the adapter. To load such an adapter, the base must be resized first, as PEFT's
AutoPeftModelForCausalLM does; the adapter then replaces the new rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llamahome.errors import ConfigError, Problem


@torch.no_grad()
def grow_embeddings(model: PreTrainedModel, rows: int) -> range:
    """Resize embedding and head of `model` to `rows` rows if they have fewer; returns the indices of the new rows."""
    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return range(0)
    model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    for layer in (model.get_input_embeddings(), head):
        layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)
    if head.bias is not None:
        head.bias[before:] = head.bias[:before].float().mean()
    return range(before, rows)


def refuse_lost_bias(model: PreTrainedModel, base: Path, *, method: str) -> None:
    """Raise ConfigError if rows of a head with a bias are to be trained with an adapter, because PEFT then ignores the bias."""
    if method == "lora" and model.get_output_embeddings().bias is not None:
        message = "its output head has a bias, which PEFT leaves out if rows of the head are trained with an adapter"
        raise ConfigError(Problem(code="model.cannot-grow", message=message, where=str(base), hint="--method full"))


def trainable_token_indices(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, list[int]] | None:
    """PEFT's trainable_token_indices: the new rows of the embedding, and of the head if it has its own weight."""
    if not rows:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: list(rows) for layer in layers}


def rows_needed(adapter_config: Mapping[str, Any]) -> int:
    """The number of embedding rows that a saved adapter needs; 0 if it trains none."""
    indices = adapter_config.get("trainable_token_indices") or {}
    lists = indices.values() if isinstance(indices, Mapping) else [indices]
    return max((int(row) for rows in lists for row in rows), default=-1) + 1


def cast_trained_rows(model: nn.Module) -> None:
    """Convert trained rows to float32, like all trained weights."""
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data = parameter.data.float()
