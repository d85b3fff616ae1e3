"""The two answers of a pair as two examples of one row: both are kept, or neither."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llamahome.config.objectives import FORMAT_OF
from llamahome.config.schema import DataConfig
from llamahome.data.records import Conversation, Example
from llamahome.data.text.render import TrainOn
from llamahome.data.text.targets import Encoded
from llamahome.errors import Problem


def learned_of(format_name: str, data: DataConfig) -> TrainOn:
    """data.train_on; of pairs and labelled rows, the answers are learned and nothing else."""
    return "judged" if format_name in FORMAT_OF.values() else data.train_on


def sides(conversation: Conversation) -> list[Conversation]:
    """The conversation itself, or the better and the worse one of a pair."""
    if not conversation.other:
        return [conversation]
    return [replace(conversation, other=()), replace(conversation, turns=conversation.other, other=())]


def together(encoded: Sequence[Encoded | Problem]) -> Encoded | Problem:
    """What `sides` became, as one row. Where max_length leaves nothing of an answer, or nothing that differs, nothing is learned."""
    if len(encoded) == 1:
        return encoded[0]
    found: list[Encoded] = []
    for side in encoded:
        if isinstance(side, Problem):
            return side
        found.append(side)
    outcomes = [side.outcome for side in found]
    examples = [example for side in found for example in side.examples]
    if "dropped" in outcomes:
        examples = []
    elif not all(example.targets.any() for example in examples) or _equal(examples):
        examples = [replace(example, targets=np.zeros_like(example.targets)) for example in examples]
    return Encoded(
        tuple(examples),
        sum(side.num_tokens for side in found),
        sum(side.num_targets for side in found),
        next((outcome for outcome in ("dropped", "truncated") if outcome in outcomes), "whole"),
        tuple(part for side in found for part in side.lost),
        longest=max(side.num_tokens for side in found),
    )


def _equal(examples: Sequence[Example]) -> bool:
    first, second = examples
    return len(first.tokens) == len(second.tokens) and bool((first.tokens == second.tokens).all())
