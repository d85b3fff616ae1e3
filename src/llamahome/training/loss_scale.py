"""The loss scale of float16: gradients are computed of the loss times a power of two, so that small ones do not become zero.

An update whose gradient overflows is not applied: the step is done again with half the scale, on the same rows and random numbers,
so nothing is skipped. After `GROWS_AFTER` updates in a row without an overflow the scale doubles. A loss that is not finite is no matter of
the scale, nor is a gradient that overflows at a scale of 1: such updates are refused as with any other type. All ranks decide alike,
because they look at the norm of the summed gradient. Each update reads that norm back from the device, which costs a GPU the work that it
could have begun.
Source: Mixed precision training, arXiv 1710.03740; torch.amp.GradScaler, which skips the rows of such a step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FIRST = 65_536.0
"""GradScaler's first scale."""
GROWS_AFTER = 2_000
"""GradScaler's growth interval."""
LARGEST = 2.0**24
"""Above it float32 sums of gradients would lose more than float16 gains."""


@dataclass(frozen=True)
class Overflowed:
    """A step whose gradient was too large for float16. Nothing was updated, and it can be done again."""

    scale: float
    """The scale that it overflowed with; the next try has half of it."""


class LossScale:
    """The scale now, and how it came about. Saved with every checkpoint, so that a resumed run scales alike."""

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        """`saved` is what `values` returned."""
        saved = saved or {"scale": FIRST, "good_steps": 0, "overflows": 0}
        self.scale, self.good_steps, self.overflows = float(saved["scale"]), int(saved["good_steps"]), int(saved["overflows"])

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Overflowed | None:
        """Overflowed, after which the scale is half, if the norm of the scaled gradient is not finite but the loss is.

        Waits for the device.
        """
        if self.scale > 1.0 and bool(torch.isfinite(loss)) and not math.isfinite(float(grad_norm)):
            overflowed = Overflowed(self.scale)
            self.scale, self.good_steps, self.overflows = self.scale / 2, 0, self.overflows + 1
            return overflowed
        return None

    def unscale(self, parameters: Sequence[nn.Parameter], grad_norm: Tensor) -> Tensor:
        """Divide the gradients by the scale, which is exact, and return their norm."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.scale)
        return grad_norm / self.scale

    def after_update(self, grad_norm: Tensor) -> None:
        """Count a step whose gradient was finite; the scale doubles after enough of them in a row."""
        self.good_steps = self.good_steps + 1 if math.isfinite(float(grad_norm)) else 0
        if self.good_steps >= GROWS_AFTER:
            self.scale, self.good_steps = min(2 * self.scale, LARGEST), 0

    def values(self) -> dict[str, Any]:
        """What a checkpoint saves, as JSON values."""
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}
