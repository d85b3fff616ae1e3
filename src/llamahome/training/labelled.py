"""KTO (arXiv 2402.01306): learns from single answers that are labelled good or bad.

The loss of a good answer is weight * (1 - sigmoid(beta * (gain - z))), that of a bad one weight * (1 - sigmoid(beta * (z - gain))). The
gain is log p / p_reference, summed over the tokens; z is the reference point, the same for all answers of a step and not differentiated.

z is the mean gain over the global batch of the step before, at least 0: a figure that this step has measured anyway, so it costs no pass,
is the same for any micro-batches and ranks, and is one number in the trainer's state. In the first step it is 0, which is exact: the model
is its own reference. The paper and TRL estimate z otherwise: from the weights of this step, over prompts with answers of other rows, in
passes of their own.

Legend: A answers of a micro-batch, one a document; N their targets.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamahome.config.preference import BETA, PreferenceConfig
from llamahome.data.records import Microbatch
from llamahome.model.backends.loss import HeadStats
from llamahome.model.objective import Objective
from llamahome.training.preferences import answer_logprobs
from llamahome.training.supervised import OverSupervised

MEASURED = ("answer_accuracy", "reward_margin", "log_ratio", "reference_point", "good_reward", "bad_reward")


@dataclass
class ReferencePoint:
    """z of the next step."""

    value: Tensor = field(default_factory=lambda: torch.zeros(()))
    """() float32."""

    def note(self, measured: Tensor) -> None:
        """Take the mean gain of a step, whose values are those of MEASURED; one that is not finite changes nothing."""
        gain = measured[MEASURED.index("log_ratio")].detach()
        self.value = torch.where(torch.isfinite(gain), gain.clamp(min=0), self.value.to(gain.device, non_blocking=True))

    def values(self) -> float:
        """The number that a checkpoint saves; JSON keeps every bit of a float32."""
        return float(self.value)

    def restore(self, saved: Any) -> None:
        """Continue from what `values` returned; None before the first step."""
        self.value = torch.tensor(float(saved or 0.0), dtype=torch.float32)


@dataclass(frozen=True)
class LabelledObjective(OverSupervised):
    """The loss of KTO, summed over answers."""

    settings: PreferenceConfig
    supervised: Objective
    """Runs the decoder and the output head."""
    point: ReferencePoint = field(default_factory=ReferencePoint)
    unit: str = "answer"
    measured: tuple[str, ...] = MEASURED

    def units(self, batch: Microbatch) -> tuple[int, ...]:
        """The number of answers, and at the end those of good and of bad ones."""
        if batch.idle:
            return (0,) * (1 + len(MEASURED))
        count, good = len(batch.lengths), sum(batch.good)
        return (*(count,) * (len(MEASURED) - 1), good, count - good)

    def loss_sum(self, batch: Microbatch) -> Tensor:
        """[7] float32: the loss and what is measured, summed over the answers; the rewards are summed over good and over bad ones."""
        return self.supervised.loss_of(batch, lambda logprobs_N: self._sums(logprobs_N, batch, self.point.value))

    @torch.no_grad()
    def stats(self, batch: Microbatch) -> HeadStats:
        """The summed loss with z = 0, so that evaluations can be compared, and how many gains have the sign of their label."""
        start = torch.zeros(())
        sums = self.supervised.loss_of(batch, lambda logprobs_N: self._sums(logprobs_N, batch, start))
        nothing = torch.zeros((), device=sums.device)
        return HeadStats(sums[0], sums[1]) if sums.ndim else HeadStats(sums, nothing)

    def _sums(self, logprobs_N: Tensor, batch: Microbatch, point: Tensor) -> Tensor:
        if batch.idle:
            return torch.cat([logprobs_N.sum().reshape(1), logprobs_N.new_zeros(len(MEASURED))])
        if batch.known_D is None:
            raise ValueError("the answers have no log-probabilities of the reference")
        device, settings = logprobs_N.device, self.settings
        beta = BETA["kto"] if settings.beta == "auto" else settings.beta
        good_A = torch.tensor(batch.good).to(device, non_blocking=True)
        gains_A = answer_logprobs(logprobs_N, batch) - batch.known_D.to(device, non_blocking=True)
        point = point.to(device, non_blocking=True)
        leads_A = beta * torch.where(good_A, gains_A - point, point - gains_A)
        weights_A = torch.where(good_A, settings.desirable_weight, settings.undesirable_weight)
        losses_A = weights_A * torch.sigmoid(-leads_A)
        rewards_A, zeros_A = beta * gains_A, torch.zeros_like(gains_A)
        good, bad = torch.where(good_A, rewards_A, zeros_A), torch.where(good_A, zeros_A, rewards_A)
        measured = ((leads_A > 0).float(), leads_A, gains_A, point.expand_as(gains_A), good, bad)
        return torch.stack([losses_A.sum(), *(values.detach().sum() for values in measured)])
