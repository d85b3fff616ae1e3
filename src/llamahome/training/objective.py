"""What a run minimises: the interface of an objective, and the choice by training.objective. The loop and the step know none by name.

An objective is a loss that adds up over units (targets, answers, pairs), so that any split of a step into micro-batches and ranks gives
the same gradient: the step divides the sum by the number of units of its global batch, counted before the first pass.
What the rows must have is in config/objectives.py, because data/ reads it, too.
"""

from typing import Any, Protocol

from torch import Tensor

from llamahome.config.schema import Config
from llamahome.data.records import Microbatch
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.loss import HeadStats
from llamahome.model.load import CausalLM
from llamahome.model.objective import Objective
from llamahome.training.distillation import DistillationObjective
from llamahome.training.labelled import LabelledObjective
from llamahome.training.policy import PolicyObjective
from llamahome.training.preferences import LOSSES, PairObjective


def targets_only(microbatch: Microbatch) -> tuple[int, ...]:
    """The units of supervised fine-tuning."""
    return (microbatch.num_targets,)


class TrainingObjective(Protocol):
    """The loss of a run."""

    @property
    def model(self) -> CausalLM:
        """The causal language model with its adapters, not PEFT's wrapper."""

    @property
    def backend(self) -> Backend:
        """Computes its passes."""

    @property
    def unit(self) -> str:
        """What the loss is a sum over, in the singular: "target", "pair" or "answer"."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of what `loss_sum` measures besides the loss; in metrics.jsonl they are train/NAME, means over units."""

    def units(self, batch: Microbatch) -> tuple[int, ...]:
        """How many units each value of `loss_sum` is a sum over, 1 + measured numbers; reads nothing from the device."""

    def loss_sum(self, batch: Microbatch) -> Tensor:
        """float32, the loss summed over the units of the micro-batch: (), or [1 + measured] with the sums of what is measured behind it.

        Only the first value is differentiated. A micro-batch without units gives zeros that can be differentiated.
        """

    def stats(self, batch: Microbatch) -> HeadStats:
        """The summed loss and the number of units that the model gets right, without gradients. The caller sets evaluation mode."""


class Memory(Protocol):
    """What an objective keeps from one step for the next; the same on all ranks."""

    def note(self, measured: Tensor) -> None:
        """Take in what a step with rows has measured, [M]; reads nothing from the device."""

    def values(self) -> Any:
        """What a checkpoint saves, as JSON values; waits for the device."""

    def restore(self, saved: Any) -> None:
        """Continue from what `values` returned; None before the first step."""


def choose_objective(config: Config, supervised: Objective) -> TrainingObjective:
    """The objective of training.objective; `supervised` runs the decoder and the output head."""
    chosen = config.training.objective
    if chosen == "sft":
        return supervised
    if chosen in LOSSES:
        return PairObjective(chosen, config.preference, supervised)
    if chosen == "distill":
        return DistillationObjective(supervised, config.distill.weight, config.distill.temperature)
    if chosen == "grpo":
        return PolicyObjective(supervised, config.grpo.temperature, config.grpo.beta)
    return LabelledObjective(config.preference, supervised)


def memory_of(objective: TrainingObjective) -> Memory | None:
    """What the objective keeps from one step for the next."""
    return objective.point if isinstance(objective, LabelledObjective) else None
