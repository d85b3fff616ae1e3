"""Losses and gradient norms of clean runs, as harsh as runs get; `python -m tests.support.series` counts what Spikes refuses of them."""

import sys
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from llamahome.training.spikes import Spikes

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
Noise = np.random.Generator


def _falling(steps: int) -> NDArray[np.float64]:
    return 1.2 + 1.6 * np.exp(-np.arange(steps) / (steps / 6))


def _norms(losses: NDArray[np.float64], source: Noise, spread: float = 0.35) -> NDArray[np.float64]:
    """Norms that follow the losses, four times as large in the first steps."""
    first = np.clip(1 - np.arange(len(losses)) / 30, 0, 1)
    return losses * np.exp(spread * source.standard_normal(len(losses))) * (1 + 3 * first)


def normal(source: Noise, steps: int) -> Series:
    losses = _falling(steps) * np.exp(0.1 * source.standard_normal(steps))
    return losses, _norms(losses, source)


def one_row_batches(source: Noise, steps: int) -> Series:
    losses = _falling(steps) * np.exp(0.6 * source.standard_normal(steps))
    return losses, _norms(losses, source, 0.5)


def outliers(source: Noise, steps: int) -> Series:
    """Three steps in a hundred vary six times as much as the others."""
    spread = np.where(source.random(steps) < 0.03, 0.5, 0.08)
    losses = _falling(steps) * np.exp(spread * source.standard_normal(steps))
    return losses, _norms(losses, source)


def memorised(source: Noise, steps: int) -> Series:
    """Ten passes over few rows until nothing is left to learn, and a row of another kind in one of a hundred steps."""
    losses = 2.5 * np.exp(-0.8 * (np.arange(steps) * 10 // steps)) * np.exp(0.5 * source.standard_normal(steps))
    losses = np.where(source.random(steps) < 0.01, 2.0 * np.exp(0.3 * source.standard_normal(steps)), losses)
    return losses, _norms(losses, source, 0.5)


def warm_up(source: Noise, steps: int) -> Series:
    """The gradient norm grows tenfold in the first hundred steps, as that of an adapter that begins at zero."""
    losses = _falling(steps) * np.exp(0.1 * source.standard_normal(steps))
    return losses, 0.2 * (1 + 9 * np.clip(np.arange(steps) / 100, 0, 1)) * np.exp(0.4 * source.standard_normal(steps))


def heavy_tails(source: Noise, steps: int) -> Series:
    """Logarithms with Student's t distribution of 3 degrees of freedom: one step in 3,000 is ten times the usual loss."""
    losses = _falling(steps) * np.exp(0.15 * source.standard_t(3, steps))
    return losses, _norms(losses, source)


def two_kinds(source: Noise, steps: int) -> Series:
    """Batches of one row: one row in twelve is ten times as hard as the others."""
    losses = np.where(source.random(steps) < 0.08, 2.5, 0.25) * np.exp(0.15 * source.standard_normal(steps))
    return losses, losses * np.exp(0.3 * source.standard_normal(steps))


CLEAN: tuple[Callable[[Noise, int], Series], ...] = (normal, one_row_batches, outliers, memorised, warm_up)
"""What a run usually looks like."""
EXTREME: tuple[Callable[[Noise, int], Series], ...] = (heavy_tails, two_kinds)


def judged(series: Series, spikes: Spikes | None = None) -> tuple[list[int], Spikes]:
    """What Spikes says to each step, and its state afterwards."""
    spikes, finite = spikes or Spikes(torch.device("cpu")), torch.tensor(True)
    losses, norms = (torch.tensor(values, dtype=torch.float32) for values in series)
    return [int(spikes.judge(loss, norm, finite & loss.isfinite())) for loss, norm in zip(losses, norms, strict=True)], spikes


def main(runs: int, steps: int = 1000) -> None:
    torch.set_num_threads(1)
    for kind in (*CLEAN, *EXTREME):
        refused = harmed = caught = 0
        for seed in range(runs):
            series = kind(np.random.default_rng(seed), steps)
            found, spikes = judged(series)
            refused, harmed = refused + sum(each > 0 for each in found), harmed + any(found)
            caught += judged((series[0][-1:] * 100, series[1][-1:] * 100), spikes)[0] == [2]
        print(f"{kind.__name__}: {refused} of {runs * steps:,} clean steps refused, in {harmed} of {runs} runs; x100 refused in {caught}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
