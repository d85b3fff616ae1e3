"""What each training.objective learns from: the kind of its rows, by which data/ and training/ know what they have in common."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

ObjectiveName = Literal["sft", "dpo", "ipo", "orpo", "kto", "simpo", "distill", "grpo"]
Learns = Literal["answers", "pairs", "labelled"]
"""answers: each row has an answer to learn. pairs: a better and a worse answer to one prompt. labelled: an answer, good or bad."""

LEARNS: Mapping[ObjectiveName, Learns] = MappingProxyType(
    {
        **dict.fromkeys(("sft", "distill", "grpo"), "answers"),
        **dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), "pairs"),
        "kto": "labelled",
    }
)
"""What the rows of an objective must have."""
FORMAT_OF: Mapping[Learns, Literal["preference", "labelled"]] = MappingProxyType({"pairs": "preference", "labelled": "labelled"})
"""The data.format that has more than one good answer to each prompt; answers alone are in any other format."""
WITHOUT_ANSWERS: Mapping[ObjectiveName, Literal["prompts"]] = MappingProxyType({"grpo": "prompts"})
"""The data.format of objectives that need no answers; it is read as any other one if there are some."""


def learns_rows(objective: ObjectiveName) -> bool:
    """Whether the answers in the rows are learned; where the model learns from answers of its own, those of the rows are references."""
    return objective not in WITHOUT_ANSWERS
