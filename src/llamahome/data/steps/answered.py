"""Prompts of a step's rows, and micro-batches of answers to them: for objectives that learn from answers which the model gives itself.

A prompt is a row up to its last answer; that answer is only a reference. Answers are laid out like the rows of any step: divided over ranks
by cost, without padding, numbered over all ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from llamahome.data.records import Example, Microbatch
from llamahome.data.steps.loader import Deliver, Loader, Place, StepBatch, lay_out
from llamahome.data.store.table import ExampleTable, RowRead, build_table


@dataclass(frozen=True)
class Prompt:
    """The tokens of a row before its last answer."""

    position: int
    """In the order of the data."""
    row: int
    """Of the source."""
    tokens: tuple[int, ...]
    reference: tuple[int, ...]
    """The tokens of the last answer, with its end."""
    source: str
    line: int


@dataclass(frozen=True)
class Answer:
    """An answer of the model to a prompt, and what the objective needs of it."""

    prompt: Prompt
    tokens: tuple[int, ...]
    """With its end token, if it has one."""
    advantage: float
    """The same for all of its tokens."""
    measured: tuple[float, ...]
    """Figures of this answer that a step reports the mean of."""


def prompts_of_step(loader: Loader, batch: StepBatch) -> list[Prompt]:
    """The prompts of all rows of a step, over all ranks, in the order of the data; rows without one are left out."""
    assert batch.table is not None, "the loader does not lay out"
    return prompts_of(batch.table, loader.rows_of(batch.begin, batch.end), begin=batch.begin)


def prompts_of(table: ExampleTable, rows: Sequence[int], *, begin: int) -> list[Prompt]:
    """The prompts of a table, whose rows are `rows` of the source and begin at position `begin`."""
    found = []
    for number, at in enumerate(table.row_of.tolist()):
        example = table.example(number)
        places = np.flatnonzero(example.targets)
        if not len(places):
            continue
        gaps = np.flatnonzero(np.diff(places) > 1)
        start, end = int(places[gaps[-1] + 1] if len(gaps) else places[0]), int(places[-1]) + 1
        tokens = tuple(example.tokens.tolist())
        if start > 1:  # at most a token that begins every text
            found.append(Prompt(begin + at, rows[at], tokens[:start], tokens[start:end], example.source, example.line))
    return found


def lay_out_answers(answers: Sequence[Answer], *, micro_batch_tokens: int, place: Place, deliver: Deliver) -> list[Microbatch]:
    """The share of one rank of the answers, with the advantage of every target and the figures of every answer beside it."""
    sources = tuple(dict.fromkeys(answer.prompt.source for answer in answers))
    table = build_table([RowRead([_example(answer)], "whole") for answer in answers], sources)
    return lay_out(table, range(len(answers)), micro_batch_tokens=micro_batch_tokens, place=place, deliver=_beside(answers, deliver))


def _example(answer: Answer) -> Example:
    tokens = np.array([*answer.prompt.tokens, *answer.tokens], np.int32)
    targets = np.arange(len(tokens)) >= len(answer.prompt.tokens)
    return Example(answer.prompt.source, answer.prompt.row, answer.prompt.line, tokens, targets)


def _beside(answers: Sequence[Answer], deliver: Deliver) -> Callable[[Microbatch], Microbatch]:
    """`deliver` for micro-batches whose keys are numbers of answers; they become positions in the order of the data."""
    width = len(answers[0].measured) if answers else 0

    def with_answers(batch: Microbatch) -> Microbatch:
        own = [answers[key] for key in batch.keys]
        advantages = [torch.full((len(answer.tokens),), answer.advantage) for answer in own]
        measured = torch.tensor([answer.measured for answer in own], dtype=torch.float32).reshape(len(own), width)
        extra = {"advantages": torch.cat([torch.zeros(0), *advantages]), "answers": measured}
        return deliver(replace(batch, extra=extra, keys=tuple(answer.prompt.position for answer in own)))

    return with_answers
