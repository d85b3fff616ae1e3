"""The section `preference`: the constants of the objectives that learn which answers are better, and which objective reads which."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import Field

from llamahome.config.section import Auto, Section

READ_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "beta": ("dpo", "ipo", "orpo", "simpo", "kto"),
        "label_smoothing": ("dpo", "simpo"),
        "length_normalized": ("dpo",),
        "gamma": ("simpo",),
        "sft_weight": ("dpo", "ipo", "simpo"),
        "desirable_weight": ("kto",),
        "undesirable_weight": ("kto",),
    }
)
"""The objectives that read each key; a key that is set for another one is refused."""
WITH_REFERENCE = ("dpo", "ipo", "kto")
"""Objectives that compare the model with the model before training."""
BETA: Mapping[str, float] = MappingProxyType({"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1})
"""What beta auto is."""


class PreferenceConfig(Section):
    """Learning which answers are better; read if training.objective is dpo, ipo, orpo, simpo or kto."""

    beta: Auto | Annotated[float, Field(gt=0)] = "auto"
    """dpo, ipo, kto: how strongly the model is held to the model before training (the reference). simpo: the factor of the mean
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
    desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """kto: the weight of the loss of a good answer. Where good answers are rare, raise it until the number of good answers times it is
    about the number of bad answers times undesirable_weight."""
    undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """kto: the weight of the loss of a bad answer."""
