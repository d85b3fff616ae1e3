"""The section `preference`: the constants of the objectives that learn from pairs of answers, and which objective reads which."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import Field

from llamahome.config.section import Auto, Section

READ_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "beta": ("dpo", "ipo", "orpo", "simpo"),
        "label_smoothing": ("dpo", "simpo"),
        "length_normalized": ("dpo",),
        "gamma": ("simpo",),
        "sft_weight": ("dpo", "ipo", "simpo"),
    }
)
"""The objectives that read each key; a key that is set for another one is refused."""
WITH_REFERENCE = ("dpo", "ipo")
"""Objectives that compare the model with the model before training."""
BETA: Mapping[str, float] = MappingProxyType({"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0})
"""What beta auto is."""


class PreferenceConfig(Section):
    """Learning from pairs of answers; read if training.objective is dpo, ipo, orpo or simpo."""

    beta: Auto | Annotated[float, Field(gt=0)] = "auto"
    """dpo, ipo: how strongly the model is held to the model before training (the reference). simpo: the factor of the mean
    log-probabilities. orpo: the weight of the odds ratio beside the loss of the better answer. auto: 0.1, and 2 with simpo."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo, simpo: the share of pairs that are taken to be the wrong way round (conservative DPO)."""
    length_normalized: bool = False
    """dpo: log-probabilities relative to the reference are divided by the number of tokens of the answer, so that longer answers gain
    nothing by their length; beta is then larger, 2 to 10."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """simpo: the margin by which the better answer must lead, in units of the loss."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """dpo, ipo, simpo: the weight of the loss of the better answer (mean over its tokens) that is added (RPO, arXiv 2404.19733)."""
