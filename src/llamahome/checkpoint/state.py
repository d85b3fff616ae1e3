"""TrainerState: all that a run knows besides weights and optimizer, as JSON that is read strictly.

A field that is missing, unknown or of another type is an error, never a default: a resumed run must not guess.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llamahome.errors import CheckpointError, Problem


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands after `step` updates."""

    step: int
    consumed: int
    """Position in the data: examples taken from the order so far."""
    tokens: int
    targets: int
    bad_steps: int
    best_loss: float | None
    """Lowest evaluation loss so far."""
    best_step: int | None
    evaluations_without_gain: int
    elapsed_s: float
    micro_batch_tokens: int
    eval_loss: float | None = None
    """Evaluation loss at this very step; null when it was not evaluated. Retention keeps the best by it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What later parts add; JSON values only."""

    def to_json(self) -> str:
        """The text of trainer_state.json; ValueError or TypeError when `extra` holds what JSON cannot."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"


_WHOLE = {"step", "consumed", "tokens", "targets", "bad_steps", "evaluations_without_gain", "micro_batch_tokens"}
_REAL_OR_NULL = {"best_loss", "eval_loss"}


def read_state(path: Path) -> TrainerState:
    """Read trainer_state.json; CheckpointError `checkpoint.damaged` names every field that is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(code="checkpoint.damaged", message=f"cannot be read: {error}", where=str(path))) from error
    if not isinstance(content, dict):
        raise CheckpointError(Problem(code="checkpoint.damaged", message="is not a JSON object", where=str(path)))
    expected = {each.name for each in fields(TrainerState)}
    faults = [f"the field {name!r} is missing" for name in sorted(expected - set(content))]
    faults += [f"the field {name!r} is unknown" for name in sorted(set(content) - expected)]
    faults += [
        f"the field {name!r} is {json.dumps(value)[:60]}" for name, value in content.items() if name in expected and not _fits(name, value)
    ]
    if faults:
        raise CheckpointError([Problem(code="checkpoint.damaged", message=fault, where=str(path)) for fault in faults])
    real = {"elapsed_s", *_REAL_OR_NULL}
    values: dict[str, Any] = {name: float(value) if name in real and value is not None else value for name, value in content.items()}
    return TrainerState(**values)


def _fits(name: str, value: Any) -> bool:
    if name == "extra":
        return isinstance(value, dict)
    if name in _REAL_OR_NULL:
        return value is None or _is_real(value)
    if name == "best_step":
        return value is None or _is_count(value)
    return _is_count(value) if name in _WHOLE else _is_real(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
