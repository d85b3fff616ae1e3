"""What alerts are made of: running averages, episodes, and the facts of a run that the texts name. Constant memory, no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

Values = Mapping[str, float | None]
"""Metrics of a step or a sample of the machine; None and NaN both stand for a number that was not finite."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something that a person should look at, and what to do about it."""

    name: str
    step: int
    text: str
    """What happened, in the run's own numbers."""
    help: str
    """What to type or to set."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rules know about a run besides its records."""

    run: str
    """What to type for this run."""
    data: str
    """The data path as it was typed."""
    horizon: int
    learning_rate: float
    """The peak."""
    slower_rate: float
    """What to advise where it is too high."""
    max_grad_norm: float | None
    micro_batch_tokens: int
    checkpoint_bytes: int = 0
    """What one checkpoint takes on the disk; 0 if it is not known."""
    first_step: int = 0
    """The step that a resumed run continues from."""

    def resume_with(self, setting: str) -> str:
        """How to stop the run and continue it with another value of a setting."""
        return f"Ctrl-C stops and saves; then: llamahome train-resume {self.run} --set {setting}"

    def slower(self) -> str:
        """How to continue with a lower learning rate."""
        return self.resume_with(f"training.learning_rate={self.slower_rate:.2g}")


Finding = tuple[str, str]
"""(text, help)."""


class Rule(Protocol):
    """Recognises one kind of trouble."""

    name: str

    def observe(self, step: int, values: Values) -> Finding | None:
        """Read one record; the finding if an episode begins with it. A record without the rule's metrics changes nothing."""


class Average:
    """Mean and variance of the last values: plain up to `span` values, then an exponential average with the same standard error."""

    def __init__(self, span: int) -> None:
        self._least_rate = 2 / (span + 1)
        self.count = 0
        self.mean = 0.0
        self.variance = 0.0

    def add(self, value: float) -> None:
        """Take one more value."""
        self.count += 1
        rate = max(self._least_rate, 1 / self.count)
        change = value - self.mean
        self.mean += rate * change
        self.variance = (1 - rate) * (self.variance + rate * change * change)

    @property
    def error(self) -> float:
        """Standard error of the mean, for independent values."""
        if self.count < 2:
            return math.inf
        plain = 1 / self.count
        share = plain if plain > self._least_rate else self._least_rate / (2 - self._least_rate)
        return math.sqrt(max(0.0, self.variance) * share * (1 + plain))


class Episode:
    """One alert per episode: it begins when a condition has held `patience` times in a row, and lasts until a milder one is over."""

    def __init__(self, patience: int = 1) -> None:
        self._patience = patience
        self._held = 0
        self.lasts = False

    def begins(self, holds: bool, *, over: bool) -> bool:
        """Take one observation; whether an episode begins with it."""
        if self.lasts:
            self.lasts, self._held = not over, 0
            return False
        self._held = self._held + 1 if holds else 0
        self.lasts = self._held >= self._patience
        return self.lasts


def finite(values: Values, name: str) -> float | None:
    """The value of a metric, or None if it is missing or not finite."""
    value = values.get(name)
    return value if value is not None and math.isfinite(value) else None
