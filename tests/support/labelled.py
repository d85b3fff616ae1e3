"""Answers that are labelled good or bad, and an independent implementation of KTO: full logits, one row at a time, Python's arithmetic."""

import math
from collections.abc import Sequence

import numpy as np
from tests.support.models import VOCABULARY
from tests.support.pairs import plain_logprob
from torch import Tensor, nn

from llamahome.config.preference import PreferenceConfig
from llamahome.data.records import Example
from llamahome.data.store.table import ExampleTable, RowRead, build_table

ROWS = ((9, 6, True), (5, 11, False), (20, 2, True), (2, 7, False), (13, 12, True))
"""Tokens of a prompt and of its answer, and whether the answer is good."""


def labelled_table(rows: Sequence[tuple[int, int, bool]] = ROWS, *, seed: int = 0, known: bool = True) -> ExampleTable:
    """One example a row; `known` are made-up log-probabilities of a reference."""
    random, read = np.random.default_rng(seed), []
    for number, (prompt, length, good) in enumerate(rows):
        tokens = random.integers(3, VOCABULARY, prompt + length).astype(np.int32)
        example = Example("labels.jsonl", number, number + 1, tokens, np.arange(len(tokens)) >= prompt, good=good)
        read.append(RowRead([example], "whole"))
    table = build_table(read, ("labels.jsonl",))
    values = -random.uniform(10, 40, len(table)).astype(np.float32) if known else None
    return ExampleTable(**table.columns(), paths=table.paths, known=values)


def plain_kto(model: nn.Module, table: ExampleTable, settings: PreferenceConfig, point: float) -> tuple[Tensor, float]:
    """The mean loss over all rows with the reference point `point`, and the reference point of the next step."""
    beta, losses, gains = 0.1 if settings.beta == "auto" else settings.beta, [], []
    for number in range(len(table)):
        example = table.example(number)
        gain = plain_logprob(model, example) - (example.known or 0.0)
        side, weight = (1, settings.desirable_weight) if example.good else (-1, settings.undesirable_weight)
        losses.append(weight * (1 - 1 / (1 + (-side * beta * (gain - point)).exp())))
        gains.append(float(gain.detach()))
    return sum(losses) / len(losses), max(0.0, math.fsum(gains) / len(gains))
