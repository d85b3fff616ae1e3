"""How the few numbers that are a run move on: pure functions from one TrainerState to the next."""

import math
from dataclasses import replace

from llamahome.checkpoint.state import TrainerState
from llamahome.training.evaluate import Evaluation


def first_state(micro_batch_tokens: int) -> TrainerState:
    """Before the first update."""
    return TrainerState(
        step=0,
        consumed=0,
        tokens=0,
        targets=0,
        bad_steps=0,
        best_loss=None,
        best_step=None,
        evaluations_without_gain=0,
        elapsed_s=0.0,
        micro_batch_tokens=micro_batch_tokens,
    )


def after_update(state: TrainerState, *, consumed: int, tokens: int, targets: int, seconds: float) -> TrainerState:
    """One more step; `consumed` is the new position in the data, `tokens` and `targets` are those of the step over all ranks."""
    return replace(
        state,
        step=state.step + 1,
        consumed=consumed,
        tokens=state.tokens + tokens,
        targets=state.targets + targets,
        elapsed_s=state.elapsed_s + seconds,
        eval_loss=None,
    )


def after_evaluation(state: TrainerState, found: Evaluation) -> TrainerState:
    """Remember the loss at this step and whether it is the lowest so far; one that is not finite is no loss, only no gain."""
    if not math.isfinite(found.loss):
        return replace(state, eval_loss=None, evaluations_without_gain=state.evaluations_without_gain + 1)
    if state.best_loss is None or found.loss < state.best_loss:
        return replace(state, eval_loss=found.loss, best_loss=found.loss, best_step=state.step, evaluations_without_gain=0)
    return replace(state, eval_loss=found.loss, evaluations_without_gain=state.evaluations_without_gain + 1)
