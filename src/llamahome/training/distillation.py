"""Distillation: the divergence from a teacher's likeliest tokens, mixed with the loss of the answers.

The teacher's values come with the micro-batches; token_losses.py has the formula. The units are targets, as in supervised fine-tuning, and
held-out rows are evaluated like there, by the loss of their answers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llamahome.data.records import Microbatch
from llamahome.data.steps.taught_steps import IDS, LOGS, REST
from llamahome.model.backends.loss import HeadStats
from llamahome.model.backends.token_losses import Distillation, TopTokens
from llamahome.model.objective import Objective
from llamahome.training.supervised import OverSupervised


@dataclass(frozen=True)
class DistillationObjective(OverSupervised):
    """(1 - weight) * cross entropy + weight * divergence, summed over targets."""

    supervised: Objective
    weight: float
    temperature: float
    unit: ClassVar[str] = "target"
    measured: ClassVar[tuple[str, ...]] = ("cross_entropy", "divergence")

    def units(self, batch: Microbatch) -> tuple[int, ...]:
        """The number of targets, three times."""
        return (batch.num_targets,) * 3

    def loss_sum(self, batch: Microbatch) -> Tensor:
        """float32 [3]: the loss, and behind it the cross entropy and the divergence."""
        sums = torch.zeros(2, device=batch.labels_N.device)
        if batch.idle:
            return torch.cat([self.supervised.loss_sum(batch).reshape(1), sums])
        teacher = TopTokens(batch.extra[IDS], batch.extra[LOGS], batch.extra[REST])
        loss = self.supervised.token_loss_sum(batch, Distillation(batch.labels_N, teacher, self.weight, self.temperature, sums))
        return torch.cat([loss.reshape(1), sums])

    def stats(self, batch: Microbatch) -> HeadStats:
        """The loss of the answers and the targets ranked first."""
        return self.supervised.stats(batch)
