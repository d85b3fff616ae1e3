"""How long a run trains where nobody said so: training.epochs and training.batch_size `auto`, resolved once the rows are known.

The rule itself is in training/passes.py; here it gets its figures, and what it finds is written into the settings, so that a resumed run
goes on with the same numbers. All ranks find the same, whether rows are streamed or not: the figures come from the same rows.
"""

import math
from collections.abc import Callable
from typing import Any

from llamahome.config.load import LoadedConfig, with_values
from llamahome.config.schema import TrainingConfig
from llamahome.data.prepare import Prepared
from llamahome.training.passes import auto_batch_size, auto_epochs
from llamahome.units import many


def resolve_amount(loaded: LoadedConfig, prepared: Prepared, *, processes: int = 1, say: Callable[[str], None]) -> LoadedConfig:
    """Replace training.epochs auto and training.batch_size auto by numbers; `say` is told in one line what was found and why."""
    training, rows = loaded.config.training, prepared.order.epoch_rows
    if training.epochs != "auto" and training.batch_size != "auto":
        return loaded
    epochs, batch, why = _amount(training, rows, prepared.targets_per_row())
    found: dict[str, Any] = {"training.epochs": epochs, "training.batch_size": batch}
    free = {key: value for key, value in found.items() if getattr(training, key.partition(".")[2]) == "auto"}
    say(f"{_told(rows, epochs, batch, training.max_steps)}, because {why}" + ("" if len(free) == 2 else f" ({next(iter(free))} is auto)"))
    if batch < processes and "training.batch_size" in free:
        idle = f"{processes - batch} of {processes} processes have nothing to do in each step"
        say(f"{idle}; --set training.batch_size={processes} gives each of them a row")
    return with_values(loaded, free, origin=f"auto: {why}")


def _amount(training: TrainingConfig, rows: int, targets_per_row: float) -> tuple[float, int, str]:
    """Passes, rows per step, and why: what somebody set stays, and the other adapts to it."""
    wished = training.batch_size
    learned = f"there are {many(rows, 'row')} with about {targets_per_row:,.0f} tokens to learn in each"
    if training.epochs != "auto":
        batch = auto_batch_size(rows, epochs=training.epochs) if training.max_steps is None else auto_batch_size(rows)
        return training.epochs, batch if wished == "auto" else wished, f"there are {many(rows, 'row')}"
    batch = auto_batch_size(rows) if wished == "auto" else wished
    if training.max_steps is not None:
        return training.max_steps * batch / rows, batch, f"training.max_steps is {training.max_steps:,}"
    return auto_epochs(rows, targets_per_row, batch_size=batch), batch, learned


def _told(rows: int, epochs: float, batch: int, max_steps: int | None) -> str:
    """`5 rows: 12 passes, 15 steps of 4 rows`."""
    steps = max_steps or max(1, math.ceil(round(epochs * rows, 6) / batch))
    passes = "1 pass" if epochs == 1 else f"{epochs:.3g} passes"
    return f"{many(rows, 'row')}: {passes}, {many(steps, 'step')} of {many(batch, 'row')}"
