"""Group relative policy optimization: the model's own answers, made likelier or less likely by their advantages.

The answers and advantages come with the micro-batches (rollouts.py); token_losses.py has the formula. The loss of a step is the sum over
all tokens of all answers divided by their number, so a token counts the same in a short answer and in a long one, as in DAPO (arXiv
2503.14476); the first GRPO averages over each answer first, so it penalizes a long wrong answer less. Every answer serves one update, so
the ratio of new to old policy is 1 and is not clipped. Held-out rows are evaluated by the loss of their answers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llamahome.data.records import Microbatch
from llamahome.model.backends.loss import HeadStats
from llamahome.model.backends.token_losses import PolicyGradient
from llamahome.model.objective import Objective
from llamahome.training.supervised import OverSupervised

MEASURED = ("reward", "reward_std", "answer_tokens", "cut_answers", "groups_without_spread")
"""Figures of every answer, whose mean over the answers of a step is recorded: its reward, the standard deviation in its group, its length,
whether it was cut, and whether its group has equal rewards, from which nothing is learned."""


@dataclass(frozen=True)
class PolicyObjective(OverSupervised):
    """-advantage * log p + beta * divergence from the model without its adapter, summed over the tokens of answers."""

    supervised: Objective
    temperature: float
    beta: float
    unit: ClassVar[str] = "target"

    @property
    def measured(self) -> tuple[str, ...]:
        """Figures of answers, then of tokens: the entropy of the policy, and the divergence if there is a reference."""
        return (*MEASURED, "entropy", *(("divergence",) if self.beta else ()))

    def units(self, batch: Microbatch) -> tuple[int, ...]:
        """The number of tokens, of answers for each of their figures, and of tokens again."""
        tokens, answers = batch.num_targets, 0 if batch.idle else len(batch.lengths)
        return (tokens, *(answers,) * len(MEASURED), *(tokens,) * (len(self.measured) - len(MEASURED)))

    def loss_sum(self, batch: Microbatch) -> Tensor:
        """float32 [1 + measured]."""
        sums = torch.zeros(2, device=batch.labels_N.device)
        if batch.idle:
            return torch.cat([self.supervised.loss_sum(batch).reshape(1), sums.new_zeros(len(self.measured))])
        reference = self.supervised.reference_logs(batch, temperature=self.temperature) if self.beta else None
        policy = PolicyGradient(batch.labels_N, batch.extra["advantages"], self.temperature, reference, self.beta, sums)
        loss = self.supervised.token_loss_sum(batch, policy)
        divergence, entropy = sums[:1], sums[1:]
        return torch.cat([loss.reshape(1), batch.extra["answers"].sum(0), entropy, *((divergence,) if self.beta else ())])

    def stats(self, batch: Microbatch) -> HeadStats:
        """The loss of the rows' own answers and the targets ranked first."""
        return self.supervised.stats(batch)
