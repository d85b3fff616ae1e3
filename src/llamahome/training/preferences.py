"""Losses of pairs of answers to one prompt, a better and a worse one: DPO, IPO, ORPO and SimPO.

The unit is the pair: the loss of a step is the mean over the pairs of its global batch. The log-probability of an answer is the sum over
its tokens, its end-of-turn token included. DPO (arXiv 2305.18290) and IPO (2310.12036) compare it with that of a reference, the model
before the first update, whose values were computed then (reference_values.py). IPO and ORPO (2403.07691) take means over the tokens of an
answer, as TRL does, and SimPO (2405.14734) by its definition. The loss of the better answer in ORPO, and that of preference.sft_weight, is
its mean over the tokens of that answer; its prompt is not learned.

Legend: P pairs of a micro-batch, A = 2 P answers: better, worse, better, worse.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llamahome.config.preference import BETA, WITH_REFERENCE, PreferenceConfig
from llamahome.data.records import Microbatch
from llamahome.model.backends.loss import HeadStats
from llamahome.model.objective import Objective
from llamahome.training.supervised import OverSupervised


@dataclass(frozen=True)
class Answers:
    """The answers of some pairs; every tensor is [P, 2] float32, the better answer first."""

    logprobs: Tensor
    """Summed over the tokens of each answer."""
    lengths: Tensor
    """Learned tokens of each answer."""
    reference: Tensor
    """`logprobs` of the reference; zeros if the objective has none."""

    @property
    def means(self) -> Tensor:
        """log p per token."""
        return self.logprobs / self.lengths

    @property
    def gains(self) -> Tensor:
        """log p / p_reference."""
        return self.logprobs - self.reference


PairLoss = Callable[[Answers, PreferenceConfig, float], tuple[Tensor, Tensor]]
"""The loss of each pair and the rewards of its answers, [P] and [P, 2], from the answers, the settings and beta."""


def _lead(values: Tensor) -> Tensor:
    return values[:, 0] - values[:, 1]


def _logistic(margins: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid of the margins; with `smoothing`, that share of the pairs counts the other way round."""
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def _dpo(answers: Answers, settings: PreferenceConfig, beta: float) -> tuple[Tensor, Tensor]:
    rewards = beta * (answers.gains / answers.lengths if settings.length_normalized else answers.gains)
    return _logistic(_lead(rewards), settings.label_smoothing), rewards


def _ipo(answers: Answers, settings: PreferenceConfig, beta: float) -> tuple[Tensor, Tensor]:
    gains = answers.gains / answers.lengths
    return (_lead(gains) - 1 / (2 * beta)).square(), beta * gains


def _simpo(answers: Answers, settings: PreferenceConfig, beta: float) -> tuple[Tensor, Tensor]:
    rewards = beta * answers.means
    return _logistic(_lead(rewards) - settings.gamma, settings.label_smoothing), rewards


def _orpo(answers: Answers, settings: PreferenceConfig, beta: float) -> tuple[Tensor, Tensor]:
    log_odds = _lead(answers.means) - _lead(_log_of_rest(answers.means))
    return -answers.means[:, 0] - beta * F.logsigmoid(log_odds), beta * answers.means


def _log_of_rest(means: Tensor) -> Tensor:
    """log(1 - p) from log p, exact for p near 0 and near 1 (Maechler, "Accurately computing log(1 - exp(-|a|))", 2012)."""
    means = means.clamp(max=-1e-7)  # p = 1 has no odds
    return torch.where(means > -0.6931, torch.log(-torch.expm1(means)), torch.log1p(-torch.exp(means)))


LOSSES: Mapping[str, PairLoss] = {"dpo": _dpo, "ipo": _ipo, "orpo": _orpo, "simpo": _simpo}


@dataclass(frozen=True)
class PairObjective(OverSupervised):
    """One of LOSSES by `name`."""

    name: str
    settings: PreferenceConfig
    supervised: Objective
    """Runs the decoder and the output head."""
    unit: str = "pair"
    measured: tuple[str, ...] = ("pair_accuracy", "reward_margin", "chosen_logprob", "rejected_logprob")

    def units(self, batch: Microbatch) -> tuple[int, ...]:
        """The number of pairs, for the loss and for all that is measured."""
        return (_pairs(batch),) * (1 + len(self.measured))

    def loss_sum(self, batch: Microbatch) -> Tensor:
        """[5] float32: the loss and what is measured, summed over the pairs."""
        return self.supervised.loss_of(batch, lambda logprobs_N: self._sums(logprobs_N, batch))

    @torch.no_grad()
    def stats(self, batch: Microbatch) -> HeadStats:
        """The summed loss, and the number of pairs whose better answer has the larger reward."""
        sums = self.loss_sum(batch)
        nothing = torch.zeros((), device=sums.device)
        return HeadStats(sums[0], sums[1]) if sums.ndim else HeadStats(sums, nothing)

    def _sums(self, logprobs_N: Tensor, batch: Microbatch) -> Tensor:
        if not _pairs(batch):
            return torch.cat([logprobs_N.sum().reshape(1), logprobs_N.new_zeros(len(self.measured))])
        answers = self._answers(logprobs_N, batch)
        beta = BETA[self.name] if self.settings.beta == "auto" else self.settings.beta
        losses, rewards = LOSSES[self.name](answers, self.settings, beta)
        if self.settings.sft_weight:
            losses = losses - self.settings.sft_weight * answers.means[:, 0]
        lead = _lead(rewards)
        measured = ((lead > 0).float(), lead, answers.logprobs[:, 0], answers.logprobs[:, 1])
        return torch.stack([losses.sum(), *(values.detach().sum() for values in measured)])

    def _answers(self, logprobs_N: Tensor, batch: Microbatch) -> Answers:
        device = logprobs_N.device
        logprobs = answer_logprobs(logprobs_N, batch).view(-1, 2)
        lengths = torch.tensor(batch.targets, dtype=torch.float32).to(device, non_blocking=True).view(-1, 2)
        if self.name not in WITH_REFERENCE:
            return Answers(logprobs, lengths, torch.zeros_like(logprobs))
        if batch.known_D is None:
            raise ValueError("the answers have no log-probabilities of the reference")
        return Answers(logprobs, lengths, batch.known_D.to(device, non_blocking=True).view(-1, 2))


def answer_logprobs(logprobs_N: Tensor, batch: Microbatch) -> Tensor:
    """[A] float32: the log-probability of each answer, from those of its tokens."""
    return torch.stack([part.sum() for part in torch.split(logprobs_N, list(batch.targets))])


def _pairs(batch: Microbatch) -> int:
    return 0 if batch.idle else len(batch.lengths) // 2
