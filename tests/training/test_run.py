"""The state of a run moves by pure functions; the parts of a run are few, and so are the frames from the loop to the loss."""

import ast
import dataclasses
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.models import examples_of, save_tiny
from tests.support.runs import RunOptions, close_run, make_learner, make_run, table_of

from llamahome import pipeline
from llamahome.checkpoint.state import judged_cost
from llamahome.training.evaluate import Evaluation
from llamahome.training.loop import train
from llamahome.training.run import Run, after_evaluation, after_update, first_state


def test_a_run_has_at_most_twelve_parts() -> None:
    assert len(dataclasses.fields(Run)) <= 12


def test_the_loop_calls_the_step_and_the_step_calls_the_loss(tmp_path: Path) -> None:
    """With `pipeline.train` and its `_run` before them, four frames lead from the command to the loss."""
    learner, frames = make_learner(save_tiny(tmp_path / "llama", "llama"), "lora"), []

    def objective(batch):
        frame = sys._getframe(1)
        while "/llamahome/" in frame.f_code.co_filename:
            frames.append(frame.f_code.co_name)
            frame = frame.f_back
        return learner.objective.loss_sum(batch)

    run = make_run(learner, RunOptions(table_of(examples_of([9, 5])), tmp_path, steps=1, objective=objective, save=lambda state: tmp_path))
    train(run, first_state(60))
    close_run(run)
    assert frames == ["train_step", "train"]
    callers = {node.name: {getattr(call.func, "id", "") for call in ast.walk(node) if isinstance(call, ast.Call)} for node in functions()}
    assert [name for name, called in callers.items() if "train_loop" in called] == ["_run"] and "_run" in callers["train"]


def functions() -> list[ast.FunctionDef]:
    return [node for node in ast.parse(Path(pipeline.__file__).read_text()).body if isinstance(node, ast.FunctionDef)]


def test_an_update_counts_and_forgets_the_last_evaluation() -> None:
    state = after_evaluation(first_state(100), Evaluation(2.0, 0.5, 10))
    state = after_update(state, consumed=4, tokens=50, targets=20, micro_batch_tokens=100, seconds=1.5)
    state = after_update(state, consumed=8, tokens=60, targets=10, micro_batch_tokens=50, seconds=0.5)
    assert (state.step, state.consumed, state.tokens, state.targets, state.elapsed_s) == (2, 8, 110, 30, 2.0)
    assert state.eval_loss is None and state.best_loss == 2.0 and state.best_step == 0 and state.micro_batch_tokens == 50


def test_the_best_evaluation_is_the_first_of_the_lowest() -> None:
    state = first_state(100)
    seen = []
    for loss in (3.0, 2.0, 2.0, float("nan"), 2.5, 1.0):
        state = after_update(state, consumed=0, tokens=0, targets=0, micro_batch_tokens=100, seconds=0)
        state = after_evaluation(state, Evaluation(loss, 0.0, 1))
        seen.append((state.best_loss, state.best_step, state.evaluations_without_gain))
    assert seen == [(3.0, 1, 0), (2.0, 2, 0), (2.0, 2, 1), (2.0, 2, 2), (2.0, 2, 3), (1.0, 6, 0)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_best_one_and_can_be_saved(loss: float) -> None:
    state = after_evaluation(first_state(100), Evaluation(loss, 0.0, 1))
    assert state.best_loss is state.best_step is state.eval_loss is None and state.evaluations_without_gain == 1
    assert json.loads(state.to_json())["eval_loss"] is None
    state = after_evaluation(state, Evaluation(5.0, 0.0, 1))
    assert state.best_loss == 5.0


def evaluated(values: list[float], metric: str):
    state = first_state(100)
    for step, value in enumerate(values):
        state = after_evaluation(replace(state, step=step), Evaluation(1.0, 0.0, 1, metric=metric, score=value))
    return state


def test_a_score_is_better_when_it_is_higher_and_of_equal_ones_the_earlier_is_the_best() -> None:
    state = evaluated([0.1, 0.5, 0.5, 0.2], "exact")
    assert state.best_step == 1 and state.evaluations_without_gain == 2
    assert judged_cost(state, "exact") == -0.2 and judged_cost(state, "f1") is None


def test_another_metric_begins_the_search_for_the_best_again() -> None:
    state = evaluated([0.1, 0.9, 0.2], "exact")
    other = after_evaluation(replace(state, step=3), Evaluation(2.0, 0.0, 1))
    assert other.best_step == 3 and other.best_loss == 2.0 and other.evaluations_without_gain == 0


def test_a_score_that_is_not_finite_is_no_gain() -> None:
    state = evaluated([0.1, math.nan], "f1")
    assert state.best_step == 0 and state.evaluations_without_gain == 1 and state.eval_loss is None
