"""Rows of embedding and output head for tokens that the model does not know (model.new_tokens, model.resize_embeddings).

Added rows begin as the mean of the old rows, and the row of a new token as the mean of the rows of its pieces. Full fine-tuning trains all
rows; with adapters, PEFT trains only these rows (trainable tokens) and saves them with the adapter. To load such an adapter, a base with
fewer rows must be resized first, as PEFT's AutoPeftModelForCausalLM does; the adapter then replaces the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llamahome.errors import ConfigError, Problem
from llamahome.units import many


@dataclass(frozen=True)
class NewRows:
    """The rows that the tokenizer of a run needs beside those of the base."""

    needed: int = 0
    """Rows that the embedding has at least."""
    pieces: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Id of each new token -> ids of the tokens that its text had before. Its row may exist in the base, as a reserved one."""


NO_NEW_ROWS = NewRows()


def make_rows(model: PreTrainedModel, new: NewRows) -> list[int]:
    """Give embedding and head of `model` the `new` rows, in place; returns the indices of the rows that were not there or not used."""
    grown = grow_embeddings(model, new.needed)
    begin_as_pieces(model, new.pieces)
    return sorted({*grown, *new.pieces})


@torch.no_grad()
def begin_as_pieces(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """Set the row of each new token to the mean of the rows of its pieces, or of all rows that have another token if it has none."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding.weight] if head.weight is embedding.weight else [embedding.weight, head.weight]
    if head.bias is not None:
        tables.append(head.bias)
    for table in tables:
        others = torch.tensor([row for row in range(table.shape[0]) if row not in pieces])
        for row, old in pieces.items():
            table[row] = table[list(old) if old else others].float().mean(0).to(table.dtype)


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


def describe_rows(model: PreTrainedModel, before: int, new_rows: Sequence[int], rows: NewRows) -> list[str]:
    """What the user should know about the rows that are new."""
    now, lines = model.get_input_embeddings().weight.shape[0], []
    if (plain := now - before - sum(1 for row in rows.pieces if row >= before)) > 0:
        lines.append(f"the embedding grows by {now - before:,} rows to {now:,}; {plain:,} begin as the mean of the others and are trained")
    if rows.pieces:
        reserved = sum(1 for row in rows.pieces if row < before)
        where = f", {reserved:,} in rows that the base has in reserve" if reserved else ""
        grown = f"the embedding has {now:,} rows" + ("" if now == before else f", {now - before:,} more than before")
        one = len(rows.pieces) == 1
        begins = "begins as the mean of its pieces and is trained" if one else "begin as the mean of their pieces and are trained"
        lines.append(f"{many(len(rows.pieces), 'new token')} {begins}{where}; {grown}")
    return lines
