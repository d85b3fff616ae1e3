"""The system message that all training rows begin with: a model that always saw it answers as trained only if it is there again.

It is found before the first step, in up to 256 rows from everywhere, and kept in the state of every checkpoint, where `chat` and `export`
read it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llamahome.checkpoint.state import STATE, read_state
from llamahome.data.prepare import Prepared
from llamahome.data.records import Row
from llamahome.data.rows.formats import understand
from llamahome.errors import CheckpointError, Problem
from llamahome.rundir import open_run, run_of

_KEY = "system"
"""Of TrainerState.extra."""
_ROWS = 256
_SHOWN = 60


def noted(prepared: Prepared) -> dict[str, Any]:
    """What the state of a run keeps of the system message; nothing if rows have none or different ones. Stops at the first such row."""
    text, reading, order = None, prepared.reading, prepared.order
    for number in order.rows_at(np.arange(min(_ROWS, order.epoch_rows)), seed=0):
        row = reading.source.parsed(int(number))
        read = understand(row, reading.format_name, reading.data.columns) if isinstance(row, Row) else row
        if isinstance(read, Problem):
            continue
        first = read.turns[0] if read.turns else {}
        if first.get("role") != "system" or text not in (None, first["content"]):
            return {}
        text = first["content"]
    return {_KEY: text} if text else {}


def of_state(extra: dict[str, Any]) -> str | None:
    """The system message in the `extra` of a run's state."""
    return extra.get(_KEY)


def of_model(folder: Path) -> str | None:
    """The system message with which the model in `folder` was trained; None if rows differed, or if it is of no run on this machine."""
    run = run_of(folder)
    for _, checkpoint in reversed(open_run(run).checkpoints() if run is not None else []):
        try:
            return of_state(read_state(checkpoint / STATE).extra)
        except CheckpointError:
            continue
    return None


def note_unless(system: str | None, folder: Path, *, note: Callable[[str], None]) -> None:
    """Name the system message with which the model in `folder` was trained, unless the command has chosen one; "" is none."""
    if system is None and (trained := of_model(folder)) is not None:
        note(f"the training rows begin with the system message {shown(trained)}: --system sets it, and --system '' hides this line")


def shown(text: str) -> str:
    """The message as a sentence quotes it."""
    plain = " ".join(text.split())
    return f'"{plain}"' if len(plain) <= _SHOWN else f'"{plain[: _SHOWN - 3]}..."'
