"""More rows for an embedding whose tokenizer has more tokens: model.resize_embeddings.

The new rows of embedding and output head begin as the mean of the old ones, so a new token is at first like any other. Full fine-tuning
trains all rows; with adapters PEFT trains the new ones alone (trainable tokens) and saves them beside the adapter. Whoever loads such an
adapter gives the base as many rows first, as PEFT's AutoPeftModelForCausalLM does by itself; what stands in them then is replaced.
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
    """Give the embedding and the head of `model` `rows` rows where they have fewer; returns the new ones."""
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
    """ConfigError: PEFT leaves out the bias of a head of which it trains rows, so an adapter would mean another model there than here."""
    if method == "lora" and model.get_output_embeddings().bias is not None:
        message = "its output head has a bias, which PEFT leaves out where rows of the head are trained with an adapter"
        raise ConfigError(Problem(code="model.cannot-grow", message=message, where=str(base), hint="--method full"))


def trained_tokens(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, list[int]] | None:
    """What PEFT calls trainable_token_indices: the new rows of the embedding, and of the head where it has weights of its own."""
    if not rows:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: list(rows) for layer in layers}


def rows_needed(adapter_config: Mapping[str, Any]) -> int:
    """Rows of the embedding that a saved adapter counts on; 0 when it trains none."""
    trained = adapter_config.get("trainable_token_indices") or {}
    every = trained.values() if isinstance(trained, Mapping) else [trained]
    return max((int(row) for rows in every for row in rows), default=-1) + 1


def in_float32(model: nn.Module) -> None:
    """Keep trained rows in float32, as all that is trained."""
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data = parameter.data.float()
