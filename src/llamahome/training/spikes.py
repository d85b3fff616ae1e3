"""Which updates are refused: those that are not finite, and those whose loss or gradient norm leaps far above the steps before.

A step is a spike if its loss or its gradient norm exceeds all of
  a ratio to the median of the last 32 applied steps,
  six robust standard deviations above that median (1.4826 times the median absolute deviation, of logarithms), and
  twice the largest value before, so that a hard row after easy ones is no spike.
Nothing is judged before 17 steps were applied. A spike between applied steps raises the largest value fourfold at most: spikes in a row are
all refused, but rows of a rare kind, which are far harder than the others, are refused once or twice and not for ever.

Everything is computed on the device from values that are equal on all ranks, so all ranks refuse the same steps and nobody waits.
Cost: 0.2 ms per step on a busy processor (measured), 300 bytes. docs/decisions/0026-spikes-and-rollbacks.md has the rate of false alarms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamahome.training.loss_scale import LossScale

WINDOW = 32
"""Applied steps that a step is compared with."""
RATIOS = (5.0, 10.0)
"""Of loss and of gradient norm to their medians. A norm varies more: batches of one row change it fivefold, measured."""
_DEVIATIONS = 6.0
_MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution (Rousseeuw and Croux, 1993)."""
_OVER_LARGEST = 2.0
_LEARNED = 4.0
"""By how much a spike raises the largest value."""
_TINY = 1e-20
"""Stands for a loss or gradient of zero, which has no logarithm."""

APPLIED, NOT_FINITE, SPIKE = 0, 1, 2
"""What StepResult.refused says."""


class Spikes:
    """The recent losses and gradient norms on the device. Saved with every checkpoint, so that a resumed run judges alike."""

    def __init__(self, device: torch.device, saved: Mapping[str, Any] | None = None) -> None:
        """`saved` is what `values` returned."""
        self._recent_2W = torch.full((2, WINDOW), torch.inf, device=device)
        self._largest_2 = torch.full((2,), -torch.inf, device=device)
        self._spike_2 = self._largest_2.clone()
        """The largest values of the spikes since the last applied step."""
        self._ratios_2 = torch.tensor(RATIOS, device=device).log()
        if saved is not None and saved["recent"][0]:
            recent = torch.tensor(saved["recent"])
            self._recent_2W[:, WINDOW - recent.shape[1] :] = recent.to(device)
            self._largest_2.copy_(torch.tensor(saved["largest"]))
            self._spike_2.copy_(torch.tensor(saved["spike"] or [-torch.inf] * 2))

    def judge(self, loss: Tensor, grad_norm: Tensor, finite: Tensor) -> Tensor:
        """() float32: APPLIED, NOT_FINITE or SPIKE. A step that is applied is remembered."""
        now_2 = torch.stack([loss.float(), grad_norm.float()]).clamp_min(_TINY).log()
        middle_2 = _median(self._recent_2W)
        deviation_2 = _median((self._recent_2W - middle_2[:, None]).abs()) * _MAD_TO_DEVIATION
        far_2 = now_2 - middle_2 > torch.maximum(self._ratios_2, _DEVIATIONS * deviation_2)
        spike = (far_2 & (now_2 - self._largest_2 > math.log(_OVER_LARGEST))).any()
        refused = torch.where(finite, spike.float() * SPIKE, NOT_FINITE)
        applied = refused == APPLIED
        self._recent_2W = torch.where(applied, torch.cat([self._recent_2W[:, 1:], now_2[:, None]], dim=1), self._recent_2W)
        learned_2 = torch.minimum(self._spike_2, self._largest_2 + math.log(_LEARNED))
        largest_2 = torch.maximum(torch.maximum(self._largest_2, learned_2), now_2)
        self._largest_2 = torch.where(applied, largest_2, self._largest_2)
        self._spike_2 = torch.where(applied, -torch.inf, torch.where(finite, torch.maximum(self._spike_2, now_2), self._spike_2))
        return refused

    def values(self) -> dict[str, Any]:
        """What a checkpoint saves, as JSON values; waits for the device."""
        recent: list[list[float]] = self._recent_2W.tolist()
        known = [[value for value in row if value != float("inf")] for row in recent]
        largest, spike = (values.tolist() for values in (self._largest_2, self._spike_2))
        return {"recent": known, "largest": largest if known[0] else [], "spike": spike if spike[0] > -float("inf") else []}


def _median(values_2W: Tensor) -> Tensor:
    """The upper median of each row; infinite until more than half of the values are known. Sorted, because every device can sort."""
    return values_2W.sort(dim=1).values[:, WINDOW // 2]


@dataclass(frozen=True)
class Limits:
    """What an update may be."""

    max_grad_norm: float | None
    """Gradients are scaled down to this norm."""
    spikes: Spikes | None = None
    """None: only what is not finite is refused."""
    scale: LossScale | None = None
    """By which losses are multiplied before their backward pass; None: not at all."""

    def scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass begins with."""
        return loss if self.scale is None else loss * self.scale.scale

    def refuse(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """() float32: APPLIED, NOT_FINITE or SPIKE, decided on the device."""
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        return 1.0 - finite.float() if self.spikes is None else self.spikes.judge(loss, grad_norm, finite)
