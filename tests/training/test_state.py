"""The few numbers of a run move by pure functions."""

import json

import pytest

from llamahome.training.evaluate import Evaluation
from llamahome.training.state import after_evaluation, after_update, first_state


def test_an_update_counts_and_forgets_the_last_evaluation() -> None:
    state = after_evaluation(first_state(100), Evaluation(2.0, 0.5, 10))
    state = after_update(state, consumed=4, tokens=50, targets=20, seconds=1.5)
    state = after_update(state, consumed=8, tokens=60, targets=10, seconds=0.5)
    assert (state.step, state.consumed, state.tokens, state.targets, state.elapsed_s) == (2, 8, 110, 30, 2.0)
    assert state.eval_loss is None and state.best_loss == 2.0 and state.best_step == 0 and state.micro_batch_tokens == 100


def test_the_best_evaluation_is_the_first_of_the_lowest() -> None:
    state = first_state(100)
    seen = []
    for loss in (3.0, 2.0, 2.0, float("nan"), 2.5, 1.0):
        state = after_evaluation(after_update(state, consumed=0, tokens=0, targets=0, seconds=0), Evaluation(loss, 0.0, 1))
        seen.append((state.best_loss, state.best_step, state.evaluations_without_gain))
    assert seen == [(3.0, 1, 0), (2.0, 2, 0), (2.0, 2, 1), (2.0, 2, 2), (2.0, 2, 3), (1.0, 6, 0)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_best_one_and_can_be_saved(loss: float) -> None:
    state = after_evaluation(first_state(100), Evaluation(loss, 0.0, 1))
    assert state.best_loss is state.best_step is state.eval_loss is None and state.evaluations_without_gain == 1
    assert json.loads(state.to_json())["eval_loss"] is None
    state = after_evaluation(state, Evaluation(5.0, 0.0, 1))
    assert state.best_loss == 5.0
