"""The settings of learning from a teacher (training.objective distill) and from rewards (grpo), and the rules that they keep."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from llamahome.config.quantities import PositiveInt
from llamahome.config.section import Section

if TYPE_CHECKING:
    from llamahome.config.schema import Config

Temperature = Annotated[float, Field(ge=0.01, le=100)]
"""Beyond these bounds a distribution is all but a single token, or all but uniform."""


class DistillConfig(Section):
    """Learning from a teacher; read if training.objective is distill."""

    teacher: str | None = None
    """The folder that `llamahome data teach` wrote: the teacher's likeliest tokens at every target."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the teacher in the loss; the rest is the cross entropy with the label."""
    temperature: Temperature = 1.0
    """Both distributions are raised to 1 / temperature and normalized before they are compared; above 1 the teacher's less likely tokens
    count more."""


class GrpoConfig(Section):
    """Learning from rewards by group relative policy optimization; read if training.objective is grpo."""

    reward: str | None = None
    """The function that rewards an answer, as FILE.py:FUNCTION; higher is better. It takes what a function of evaluation.metric takes:
    (answer, reference), (answer, reference, prompt) or (answer, reference, row)."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt of a step, which are compared with each other."""
    max_new_tokens: PositiveInt = 256
    """Most tokens of an answer; a longer one is cut, rewarded and learned as it is."""
    temperature: Temperature = 1.0
    """Temperature of the answers, and of the distribution that is trained."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence from the model without its adapter, per token. 0 computes none; above 0 needs a new adapter."""
    divide_by_std: bool = False
    """Divide advantages by the standard deviation of their group, as the first GRPO did. It gives prompts that are nearly always or
    nearly never solved more weight (arXiv 2503.20783)."""


def learning_errors(config: "Config") -> Iterator[tuple[str, str, str, str]]:
    """What is missing or contradicts, as findings of check.py."""
    if config.training.objective == "distill" and config.distill.teacher is None:
        message = "training.objective distill needs what a teacher says about these rows, and distill.teacher names no folder"
        hint = "llamahome data teach DATA --teacher MODEL --output taught, then --set distill.teacher=taught"
        yield "config.no-teacher", "distill.teacher", message, hint
    if config.training.objective != "grpo":
        return
    if config.grpo.reward is None:
        message = "training.objective grpo needs a function that rewards answers, and grpo.reward names none"
        yield "config.no-reward", "grpo.reward", message, "--reward FILE.py:FUNCTION"
    if config.data.train_on == "all":
        message = "training.objective grpo answers prompts, and with data.train_on all they are learned as well, so none is left to answer"
        yield "config.no-prompts", "data.train_on", message, "--set data.train_on=last"
    if config.grpo.beta and config.training.method == "full":
        message = f"grpo.beta {config.grpo.beta:g} compares with the model without its adapter, and training.method full has none"
        yield "config.no-reference", "grpo.beta", message, "--set grpo.beta=0"
    elif config.grpo.beta and config.model.adapter is not None:
        message = f"grpo.beta {config.grpo.beta:g} compares with the model without its adapter, which would be the one before model.adapter"
        hint = "--set grpo.beta=0, or llamahome export ADAPTER --to merged and --model with that folder"
        yield "config.no-reference", "grpo.beta", message, hint
