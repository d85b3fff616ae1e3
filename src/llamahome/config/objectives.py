"""What each training.objective learns from: the kind of its rows, by which data/ and training/ know what they have in common."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

ObjectiveName = Literal["sft", "dpo", "ipo", "orpo", "kto", "simpo", "distill", "grpo"]
Learns = Literal["answers", "pairs", "labelled"]
"""answers: each row has an answer to learn. pairs: a better and a worse answer to one prompt. labelled: an answer, good or bad."""

LEARNS: Mapping[ObjectiveName, Learns] = MappingProxyType(
    {"sft": "answers", "dpo": "pairs", "ipo": "pairs", "orpo": "pairs", "simpo": "pairs", "distill": "answers", "grpo": "answers"}
)
"""What the rows of an objective must have. An objective that is not named here does not exist yet and is refused."""
