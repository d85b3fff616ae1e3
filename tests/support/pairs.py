"""Pairs of answers to random prompts, and an independent implementation of the losses: full logits, one row at a time."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from tests.support.models import VOCABULARY
from torch import Tensor, nn

from llamahome.config.preference import PreferenceConfig
from llamahome.data.records import Example
from llamahome.data.store.table import ExampleTable, RowRead, build_table

SHAPES = ((9, 6, 4), (5, 3, 11), (20, 2, 2), (2, 7, 1), (13, 12, 8))
"""Tokens of a prompt, of the better answer, and of the worse one."""


def pair_table(shapes: Sequence[tuple[int, int, int]] = SHAPES, *, seed: int = 0, known: bool = True) -> ExampleTable:
    """Rows of two examples; `known` are made-up log-probabilities of a reference."""
    random, rows = np.random.default_rng(seed), []
    for number, (prompt, *answers) in enumerate(shapes):
        first = random.integers(3, VOCABULARY, prompt)
        both = []
        for length in answers:
            tokens = np.concatenate([first, random.integers(3, VOCABULARY, length)]).astype(np.int32)
            both.append(Example("pairs.jsonl", number, number + 1, tokens, np.arange(len(tokens)) >= prompt))
        rows.append(RowRead(both, "whole"))
    table = build_table(rows, ("pairs.jsonl",))
    values = -random.uniform(5, 30, len(table)).astype(np.float32) if known else None
    return ExampleTable(**table.columns(), paths=table.paths, known=values)


def plain_logprob(model: nn.Module, example: Example) -> Tensor:
    """The log-probability of the targets, from all logits of transformers' own forward."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64))
    logits = model(input_ids=tokens[None]).logits[0].float().log_softmax(-1)
    return sum(logits[at - 1, tokens[at]] for at in np.flatnonzero(example.targets))


def plain_pair_loss(
    name: str, logps: Sequence[Tensor], refs: Sequence[float], lengths: Sequence[int], settings: PreferenceConfig
) -> Tensor:
    """The loss of one pair by the formulas of the papers, in Python's arithmetic."""
    (good, bad), (good_ref, bad_ref), (good_len, bad_len) = logps, refs, lengths
    beta = {"simpo": 2.0}.get(name, 0.1) if settings.beta == "auto" else settings.beta

    def minus_log_sigmoid(x: Tensor) -> Tensor:
        return torch.log1p(torch.exp(-x))

    smoothing = settings.label_smoothing
    if name == "dpo":
        scale = (good_len, bad_len) if settings.length_normalized else (1, 1)
        margin = beta * ((good - good_ref) / scale[0] - (bad - bad_ref) / scale[1])
        loss = (1 - smoothing) * minus_log_sigmoid(margin) + smoothing * minus_log_sigmoid(-margin)
    elif name == "ipo":
        loss = ((good - good_ref) / good_len - (bad - bad_ref) / bad_len - 1 / (2 * beta)) ** 2
    elif name == "simpo":
        margin = beta * (good / good_len - bad / bad_len) - settings.gamma
        loss = (1 - smoothing) * minus_log_sigmoid(margin) + smoothing * minus_log_sigmoid(-margin)
    else:
        odds = [torch.exp(each / length) / (1 - torch.exp(each / length)) for each, length in ((good, good_len), (bad, bad_len))]
        loss = -good / good_len + beta * minus_log_sigmoid(torch.log(odds[0] / odds[1]))
    assert math.isfinite(float(loss.detach()))
    return loss - settings.sft_weight * good / good_len


def plain_step(model: nn.Module, table: ExampleTable, name: str, settings: PreferenceConfig) -> tuple[Tensor, list[list[float]]]:
    """The mean loss over all pairs, and of each pair its two log-probabilities."""
    losses, values = [], []
    for row in range(table.num_rows):
        pair = [table.example(2 * row + side) for side in (0, 1)]
        logps = [plain_logprob(model, example) for example in pair]
        lengths = [int(example.targets.sum()) for example in pair]
        losses.append(plain_pair_loss(name, logps, [example.known or 0.0 for example in pair], lengths, settings))
        values.append([float(logp.detach()) for logp in logps])
    return torch.stack(losses).mean(), values
