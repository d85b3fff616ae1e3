"""TrainerState: everything that a run knows besides weights and optimizer, as JSON that is read strictly.

A missing or unknown field or a wrong type is an error and never replaced by a default, because a resumed run must not guess.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from llamahome.errors import CheckpointError, Problem

STATE = "trainer_state.json"
"""Name of its file in a checkpoint."""
Count = Annotated[int, Field(strict=True, ge=0)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """The state of a run after `step` updates."""

    step: Count
    consumed: Count
    """Position in the data: the number of examples consumed so far."""
    tokens: Count
    targets: Count
    bad_steps: Count
    best_loss: Real | None
    """Evaluation loss at `best_step`; the lowest so far if evaluation.metric is loss."""
    best_step: Count | None
    """Step with the best evaluation so far, the earlier of equal ones."""
    evaluations_without_gain: Count
    elapsed_s: Real
    micro_batch_tokens: Count
    eval_loss: Real | None = None
    """Evaluation loss at this step; null if this step was not evaluated. Retention keeps the best checkpoints by it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """JSON values of other parts."""

    def to_json(self) -> str:
        """The text of trainer_state.json. Raises ValueError or TypeError if `extra` contains what JSON cannot."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"


def judged_cost(state: TrainerState, metric: str) -> float | None:
    """The value of evaluation.metric at the step of `state`, negated where higher is better; None if it was not evaluated then."""
    judged = state.extra.get("judged")
    if judged and judged["metric"] == metric and judged["step"] == state.step:
        value = float(judged["value"])
        return value if metric == "loss" else -value
    if metric != "loss":
        return None
    return state.best_loss if state.eval_loss is None and state.best_step == state.step else state.eval_loss


def first_evaluation(state: TrainerState) -> dict[str, Any]:
    """The evaluation before training, as JSON values; empty if nothing was held out."""
    return (state.extra.get("first") or {}).get("evaluation") or {}


def judged_by(state: TrainerState) -> str:
    """The evaluation.metric of the last evaluation."""
    return str(state.extra.get("judged", {}).get("metric", "loss"))


_TYPES = TypeAdapter(TrainerState)


def read_state(path: Path) -> TrainerState:
    """Read trainer_state.json. Raises CheckpointError checkpoint.damaged, with one problem for each wrong field."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(code="checkpoint.damaged", message=f"cannot be read: {error}", where=str(path))) from error
    if not isinstance(content, dict):
        raise CheckpointError(Problem(code="checkpoint.damaged", message="is not a JSON object", where=str(path)))
    expected = {each.name for each in fields(TrainerState)}
    wrong = dict.fromkeys(sorted(expected - set(content)), "is missing")
    wrong |= dict.fromkeys(sorted(set(content) - expected), "is unknown")
    try:
        state = _TYPES.validate_python(content)
    except ValidationError as error:
        names = [str(each["loc"][0]) for each in error.errors()]
        wrong |= {name: f"is {json.dumps(content[name])[:60]}" for name in names if name not in wrong}
    if wrong:
        problems = [
            Problem(code="checkpoint.damaged", message=f"the field {name!r} {what}", where=str(path)) for name, what in wrong.items()
        ]
        raise CheckpointError(problems)
    return state
