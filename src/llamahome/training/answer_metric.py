"""The metric of an evaluation that needs answers: the model answers some held-out prompts, greedy, and each answer gets a score.

The prompts are the same at every evaluation, and so is the most that an answer may be long, so the means of two evaluations compare.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import ConfigError, Problem
from llamahome.model.load import CausalLM
from llamahome.model.shard import Placement
from llamahome.training.answering import generate_answers
from llamahome.training.answers import last_span, without_end
from llamahome.training.scores import Metric, open_metric

FROM_TARGETS = ("loss", "token_accuracy")
"""Metrics that every evaluation computes; all others need answers."""
ANSWERED_ROWS = 32
"""Most held-out rows that are answered at an evaluation."""
_MOST_TOKENS, _ROOM = 256, 16
"""Most tokens of an answer, and how much longer than the longest reference it may be."""


@dataclass(frozen=True)
class _Prompt:
    tokens: list[int]
    text: str
    reference: str


def open_answer_metric(name: str) -> Metric | None:
    """The metric evaluation.metric names; None if it needs no answers. Raises ConfigError if there is no such metric or function."""
    if name in FROM_TARGETS:
        return None
    where = "evaluation.metric"
    try:
        metric = open_metric(name)
    except ConfigError as error:
        raise ConfigError([_as_setting(problem) for problem in error.problems]) from error
    if metric.needs_row:
        message = f"{name} reads the whole row, which training does not keep; a function of (answer, reference, prompt) can be used"
        raise ConfigError(Problem(code="evaluation.metric-reads-row", message=message, where=where))
    return metric


def _as_setting(problem: Problem) -> Problem:
    hint = problem.hint
    if hint is not None and hint.startswith("--metric "):
        hint = f"--set evaluation.metric={hint.removeprefix('--metric ')}"
    message = problem.message.replace("; there are ", "; there are loss, token_accuracy, ")
    where = "evaluation.metric" if problem.where == "--metric" else problem.where
    return Problem(code=problem.code, message=message, where=where, excerpt=problem.excerpt, hint=hint)


def answer_room(table: ExampleTable) -> int:
    """The most tokens of an answer to a prompt of `table`: 16 more than the longest reference has, but at most 256."""
    spans = [last_span(targets.tolist()) for targets in (table.example(number).targets for number in range(len(table))) if targets.any()]
    return min(_MOST_TOKENS, max((end - start for start, end in spans), default=0) + _ROOM)


class AnswerMetric:
    """Lets the model answer the prompts of some examples and returns the mean score of the answers."""

    def __init__(self, metric: Metric, table: ExampleTable, tokenizer: ChatTokenizer) -> None:
        """Raises ConfigError if no example has a prompt and an answer, as plain texts have none."""
        self.metric, self._tokenizer = metric, tokenizer
        self._prompts = [prompt for prompt in (_prompt(table, number, tokenizer) for number in range(len(table))) if prompt is not None]
        self._room = answer_room(table)
        if not self._prompts:
            message = f"{metric.name} needs answers, and no held-out row has a prompt and an answer"
            hint = "--set evaluation.metric=loss"
            raise ConfigError(Problem(code="evaluation.no-prompts", message=message, where="evaluation.metric", hint=hint))

    def mean(self, model: CausalLM, placement: Placement) -> float:
        """The mean over all prompts; all ranks call it. Ranks share the prompts, unless all of them must make the same passes."""
        world = placement.exchange.world
        mine = self._prompts if placement.equal_passes else self._prompts[world.rank :: world.size]
        answers = placement.within(lambda: self._answers(model, mine, alone=not placement.equal_passes)) if mine else []
        counts = world.is_main or not placement.equal_passes
        scores = [float(self.metric.score(each.text, answer, each.reference)) for each, answer in zip(mine, answers, strict=True) if counts]
        total = torch.tensor([math.fsum(scores)], dtype=torch.float64)
        world.sum_(total)
        return float(total) / len(self._prompts)

    def _answers(self, model: CausalLM, prompts: Sequence[_Prompt], *, alone: bool) -> list[str]:
        tokens, ends = [prompt.tokens for prompt in prompts], self._tokenizer.all_ends
        generated = generate_answers(model, tokens, end_ids=ends, max_new_tokens=self._room, alone=alone)
        return [self._tokenizer.decode(ids).strip() for ids in generated]


def _prompt(table: ExampleTable, number: int, tokenizer: ChatTokenizer) -> _Prompt | None:
    """The tokens before the last run of targets, and that run as the reference; None if either is missing."""
    example = table.example(number)
    if not example.targets.any():
        return None
    start, end = last_span(example.targets.tolist())
    tokens = example.tokens.tolist()
    if start < 2:  # at most a token that begins every text
        return None
    reference = tokenizer.decode(without_end(tokens[start:end], tokenizer.all_ends)).strip()
    return _Prompt(tokens[:start], tokenizer.decode(tokens[:start]), reference)
