"""training.max_time ends a run between two steps, as a whole: evaluated, saved, and with the time of earlier processes counted."""

import dataclasses
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import examples_of, save_tiny
from tests.support.runs import RunOptions, close_run, make_learner, make_run, table_of
from tests.support.summary import SUMMARY

from llamahome.config.load import load_config
from llamahome.monitoring.display import StepTimer, read_summary, write_summary
from llamahome.planning.time_limit import within_limit
from llamahome.training.evaluate import Evaluation
from llamahome.training.loop import train
from llamahome.training.run import Outcome, first_state


def outcome_of(folder: Path, *, max_seconds: float | None, spent: float = 0.0) -> Outcome:
    """A run of six steps that each take at least 50 ms."""
    learner = make_learner(save_tiny(folder / "llama", "llama"), "lora")

    def objective(batch):
        time.sleep(0.05)
        return learner.objective.loss_sum(batch)

    examples = table_of(examples_of([9, 5]))
    settings = {"max_seconds": max_seconds}
    made = make_run(learner, RunOptions(examples, folder, steps=6, objective=objective, settings=settings))
    made = dataclasses.replace(made, evaluate=lambda step: Evaluation(1.0 + step, 0.0, 1))
    outcome = train(made, dataclasses.replace(first_state(60), elapsed_s=spent))
    close_run(made)
    return outcome


def test_the_run_ends_after_the_step_in_which_its_time_is_over_with_a_checkpoint_and_an_evaluation(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, max_seconds=0.07)
    assert outcome.reason == "time is up" and 1 <= outcome.state.step < 6
    assert outcome.checkpoint == tmp_path / f"checkpoint-{outcome.state.step}" and outcome.checkpoint.is_dir()
    assert outcome.state.eval_loss == 1.0 + outcome.state.step and outcome.state.elapsed_s >= 0.07


def test_one_step_is_trained_however_short_the_time(tmp_path: Path) -> None:
    assert outcome_of(tmp_path, max_seconds=1e-6).state.step == 1


def test_the_time_of_earlier_processes_counts(tmp_path: Path) -> None:
    assert outcome_of(tmp_path, max_seconds=1000.0, spent=999.99).state.step == 1


@pytest.mark.parametrize("max_seconds", [None, 1000.0])
def test_a_run_that_is_faster_finishes(tmp_path: Path, max_seconds: float | None) -> None:
    outcome = outcome_of(tmp_path, max_seconds=max_seconds)
    assert outcome.reason == "finished" and outcome.state.step == 6 and 0.3 <= outcome.state.elapsed_s < 1000


@given(horizon=st.integers(1, 10**6), seconds=st.floats(1e-3, 1e7), minutes=st.integers(1, 10**4))
def test_a_plan_ends_at_its_last_step_or_where_its_time_is_over(horizon: int, seconds: float, minutes: int) -> None:
    training = load_config([], assignments=[f"training.max_time={minutes} min"]).config.training
    planned, line = within_limit(training, horizon=horizon, seconds=seconds)
    if line is None:
        assert planned == seconds <= 60 * minutes * (1 + 1 / horizon) or seconds * (horizon - 1) < 60 * minutes * horizon
    else:
        assert planned == 60 * minutes < seconds and f"of {horizon:,}" in line


def test_without_a_limit_a_plan_is_never_cut_short() -> None:
    assert within_limit(load_config([]).config.training, horizon=10, seconds=1e9) == (1e9, None)


@pytest.mark.parametrize(("limit", "left"), [(None, 350.0), (5.0, 5.0), (1e6, 350.0), (-3.0, 0.0)])
def test_the_time_left_is_never_longer_than_the_limit(tmp_path: Path, limit: float | None, left: float) -> None:
    """It is the same for who watches the run from another process, who reads the summary."""
    ends_at = None if limit is None else time.time() + limit
    write_summary(tmp_path, dataclasses.replace(SUMMARY, horizon=36, ends_at=ends_at))
    clock = [0.0]
    timer = StepTimer(read_summary(tmp_path), lambda: clock[0])
    clock[0] = 10.0
    timer.update(1)
    assert timer.left() == pytest.approx(left, abs=1.0)
