"""The loop does the planned steps, obeys requests, and gives the same weights however often it logs, evaluates or saves."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from tests.support.models import examples_of, save_tiny
from tests.support.runs import Learner, Method, RunOptions, close_run, make_learner, make_run, table_of
from torch import Tensor

from llamahome.data.records import Microbatch
from llamahome.errors import CheckpointError, Diverged, OutOfMemory, Problem
from llamahome.monitoring.recorder import Recorder, Window
from llamahome.monitoring.throughput import PartClock
from llamahome.training.evaluate import Evaluation
from llamahome.training.loop import train
from llamahome.training.optimizer import set_learning_rate
from llamahome.training.run import Outcome, first_state
from llamahome.training.schedule import learning_rate
from llamahome.training.spikes import Limits
from llamahome.training.step import step_seed, train_step

ROWS = table_of(examples_of([9, 25, 14, 3, 30, 7, 18, 11, 22, 6], seed=1))
HELD_OUT = table_of(examples_of([12, 20, 5], seed=2))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def run(learner: Learner, plan: RunOptions) -> Outcome:
    made = make_run(learner, plan)
    try:
        return train(made, first_state(plan.micro_batch_tokens))
    finally:
        close_run(made)


def plan_in(folder: Path, **changes) -> RunOptions:
    return RunOptions(ROWS, folder, **changes)


def lines(plan: RunOptions, name: str) -> list[dict]:
    path = plan.folder / "metrics" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_does_its_steps_counts_them_and_saves_the_last(llama: Path, tmp_path: Path) -> None:
    learner, plan = make_learner(llama, "lora"), plan_in(tmp_path, steps=5, evaluation=HELD_OUT)
    before = learner.weights()
    outcome = run(learner, plan)
    metrics = lines(plan, "metrics.jsonl")
    assert outcome.reason == "finished" and outcome.checkpoint == tmp_path / "checkpoint-5"
    assert outcome.state.step == 5 and outcome.state.consumed == 20 and outcome.state.bad_steps == 0
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert outcome.state.tokens == metrics[-1]["train/tokens"] == sum(2 * len(ROWS.example(row).tokens) for row in range(10))
    assert outcome.state.targets == metrics[-1]["train/targets"]
    assert [step for step, _ in plan.evaluations] == [5] and outcome.state.eval_loss == plan.evaluations[0][1].loss
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] and not same(learner.weights(), before)


def test_the_loop_is_one_step_after_the_other_with_the_rate_and_the_seeds_of_each(llama: Path, tmp_path: Path) -> None:
    learner, plan = make_learner(llama, "lora", dropout=0.4), plan_in(tmp_path)
    run(learner, plan)
    by_hand, rates = make_learner(llama, "lora", dropout=0.4), []
    made = make_run(by_hand, plan_in(tmp_path / "parts"))
    for number, batch in enumerate(made.loader):
        microbatches = batch.microbatches
        rates.append(learning_rate(number, peak=plan.peak, horizon=6, warmup=1, shape="cosine"))
        set_learning_rate(by_hand.optimizer, rates[-1])
        train_step(
            by_hand.objective.loss_sum,
            by_hand.optimizer,
            microbatches,
            divisors=[sum(each.num_targets for each in microbatches)],
            seed=step_seed(7, number),
            limits=Limits(1.0),
            reducer=made.reducer,
            clock=PartClock(),
        )
    close_run(made)
    assert same(learner.weights(), by_hand.weights())
    assert [line["train/learning_rate"] for line in lines(plan, "metrics.jsonl")] == pytest.approx(rates)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_looking_saving_and_logging_more_often_changes_no_bit(llama: Path, tmp_path: Path, method: Method) -> None:
    lora = {"dropout": 0.3} if method == "lora" else {}
    found = []
    often = {"evaluate_every": "1 step", "save_every": "2 steps", "log_every": "3 steps"}
    for number, changes in enumerate([{}, often, {"evaluate_every": "2 steps", "save_every": "1 step"}]):
        learner, plan = make_learner(llama, method, **lora), plan_in(tmp_path / str(number), evaluation=HELD_OUT, **changes)
        run(learner, plan)
        found.append((learner.weights(), plan))
    assert same(found[0][0], found[1][0]) and same(found[0][0], found[2][0])
    assert [step for step, _ in found[1][1].evaluations] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found[2][1].evaluations] == [2, 4, 6]
    assert [line["step"] for line in lines(found[1][1], "metrics.jsonl") if "train/loss" in line] == [1, 2, 3, 4, 6]
    assert found[1][1].evaluations[-1][1] == found[0][1].evaluations[-1][1]


def bad_at(learner: Learner, *steps: int) -> Callable[[Microbatch], Tensor]:
    """An objective that is not a number in these steps, counted from 1; micro-batch 0 comes first in each."""
    seen = [0]

    def objective(batch: Microbatch) -> Tensor:
        seen[0] += batch.index == 0
        loss = learner.objective.loss_sum(batch)
        return loss * float("nan") if seen[0] in steps else loss

    return objective


def test_bad_steps_are_refused_counted_and_written_down_with_their_rows(llama: Path, tmp_path: Path) -> None:
    learner = make_learner(llama, "lora")
    plan = plan_in(tmp_path, steps=6, objective=bad_at(learner, 2, 3, 5), log_every="4 steps")
    outcome = run(learner, plan)
    assert outcome.reason == "finished" and outcome.state.step == 6 and outcome.state.bad_steps == 3
    events = [event for event in lines(plan, "events.jsonl") if event["kind"] == "bad-step"]
    assert [event["step"] for event in events] == [2, 3, 5]
    assert events[0]["rows"] == plan.names_of(4, 8)
    assert [text for text in plan.progress.warnings if "not finite" in text and "not applied" in text] == plan.progress.warnings != []


class Behind(Recorder):
    """As on a device that works behind the host: the values of a step are not there when the step has been given to it."""

    def cut(self, step: int, sent: Mapping[str, float] = MappingProxyType({})) -> Window | None:
        window = super().cut(step, sent)
        if window is not None:
            window.values.late = True
        return window


def test_what_a_device_has_not_computed_yet_is_read_one_step_late_and_all_of_it_before_an_evaluation_and_the_end(
    llama: Path, tmp_path: Path
) -> None:
    written: dict[str, list[int]] = {"prompt": [], "late": []}
    found = {}
    for name, seen in written.items():
        learner = make_learner(llama, "lora")
        plan = plan_in(tmp_path / name, steps=7, evaluation=HELD_OUT, evaluate_every="4 steps")
        bad = bad_at(learner, 3)

        def objective(batch: Microbatch, plan: RunOptions = plan, seen: list[int] = seen, bad: Callable = bad) -> Tensor:
            if batch.index == 0:
                seen.append(len(lines(plan, "metrics.jsonl")))
            return bad(batch)

        plan.objective = objective
        made = make_run(learner, plan)
        if name == "late":
            made.recorder.close()
            options = {"tensorboard_dir": None, "is_main": True, "resume_step": None, "flops_per_token": 1.0, "peak_flops": None}
            made = dataclasses.replace(made, recorder=Behind(plan.folder / "metrics", warn=pytest.fail, **options))
        outcome = train(made, first_state(plan.micro_batch_tokens))
        close_run(made)
        assert outcome.state.bad_steps == 1 and [event["step"] for event in lines(plan, "events.jsonl")][:1] == [3]
        found[name] = [
            (line["step"], line["train/loss"], line["train/grad_norm"], line["train/tokens"]) for line in lines(plan, "metrics.jsonl")
        ]
    assert written == {"prompt": [0, 1, 2, 3, 4, 5, 6], "late": [0, 0, 1, 2, 4, 4, 5]}
    assert str(found["late"]) == str(found["prompt"])  # also where a value is not a number


def test_the_rows_of_a_bad_step_are_its_own_after_a_resume_with_another_batch_size(llama: Path, tmp_path: Path) -> None:
    learner = make_learner(llama, "lora")
    plan = plan_in(tmp_path, steps=8, objective=bad_at(learner, 2), batch_size=3, start=16)
    made = make_run(learner, plan)
    train(made, dataclasses.replace(first_state(60), step=4, consumed=16))
    close_run(made)
    (event,) = lines(plan, "events.jsonl")
    assert (event["step"], event["rows"]) == (6, plan.names_of(19, 22))


@pytest.mark.parametrize("log", ["1 step", "4 steps", "100 steps"])
def test_too_many_bad_steps_in_a_row_end_the_run_however_often_it_is_logged(llama: Path, tmp_path: Path, log: str) -> None:
    """Also when good steps follow before anybody looks."""
    learner = make_learner(llama, "lora")
    plan = plan_in(tmp_path, steps=8, objective=bad_at(learner, 2, 4, 5, 6), log_every=log)
    with pytest.raises(Diverged) as error:
        run(learner, plan)
    (problem,) = error.value.problems
    assert error.value.exit_status == 6 and problem.code == "training.diverged" and "3 steps in a row" in problem.message
    assert ", ".join(plan.names_of(20, 24)) in problem.message and problem.hint
    assert [event["step"] for event in lines(plan, "events.jsonl") if event["kind"] == "bad-step"] == [2, 4, 5, 6]


@pytest.mark.parametrize("room", [60, 45, 35])
def test_a_step_that_does_not_fit_into_memory_is_done_again_in_smaller_passes(llama: Path, tmp_path: Path, room: int) -> None:
    learner, plan = make_learner(llama, "lora"), plan_in(tmp_path / "roomy", steps=5)
    run(learner, plan)
    tight = make_learner(llama, "lora")

    def objective(batch: Microbatch) -> Tensor:
        loss = tight.objective.loss_sum(batch)
        if batch.num_tokens > room:
            raise torch.OutOfMemoryError("no more memory")
        return loss

    scarce = plan_in(tmp_path / "tight", steps=5, objective=objective)
    outcome = run(tight, scarce)
    assert outcome.reason == "finished" and outcome.state.step == 5
    assert lines(scarce, "metrics.jsonl")[-1]["train/targets"] == lines(plan, "metrics.jsonl")[-1]["train/targets"]
    torch.testing.assert_close(tight.weights(), learner.weights(), rtol=1e-3, atol=1e-5)
    budgets = [event["micro_batch_tokens"] for event in lines(scarce, "events.jsonl") if event["kind"] == "out-of-memory"]
    assert budgets == sorted(set(budgets), reverse=True) and len(scarce.progress.warnings) == len(budgets)
    assert outcome.state.micro_batch_tokens == ([60, *budgets])[-1] and bool(budgets) == (room < 60)


def test_an_example_that_does_not_fit_alone_ends_the_run(llama: Path, tmp_path: Path) -> None:
    def objective(batch: Microbatch) -> Tensor:
        raise torch.OutOfMemoryError(f"{batch.num_tokens} tokens")

    with pytest.raises(OutOfMemory, match="single example"):
        run(make_learner(llama, "lora"), plan_in(tmp_path, objective=objective))


def test_the_bad_steps_of_an_earlier_process_stay_counted(llama: Path, tmp_path: Path) -> None:
    learner = make_learner(llama, "lora")
    made = make_run(learner, plan_in(tmp_path, steps=2, objective=bad_at(learner, 1)))
    state = train(made, dataclasses.replace(first_state(60), bad_steps=4)).state
    close_run(made)
    assert state.bad_steps == 5


@pytest.mark.parametrize("after", [0, 2])
def test_a_request_to_stop_ends_the_run_after_its_step_with_a_checkpoint(llama: Path, tmp_path: Path, after: int) -> None:
    learner, plan = make_learner(llama, "lora"), plan_in(tmp_path, evaluation=HELD_OUT)
    calls = [0]

    def objective(batch: Microbatch) -> Tensor:
        calls[0] += batch.index == 0
        plan.stop.asked = calls[0] == after
        return learner.objective.loss_sum(batch)

    plan.objective, plan.stop.asked = objective, after == 0
    outcome = run(learner, plan)
    assert outcome.reason == "asked to stop" and outcome.state.step == after and outcome.checkpoint == tmp_path / f"checkpoint-{after}"
    assert outcome.checkpoint.is_dir() and plan.evaluations == []


def test_no_gain_for_so_many_evaluations_ends_the_run(llama: Path, tmp_path: Path) -> None:
    learner = make_learner(llama, "lora")
    plan = plan_in(tmp_path, steps=10, evaluate_every="1 step", settings={"early_stop_patience": 2, "save_best": True})
    made = make_run(learner, plan)
    losses = {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5, 5: 1.0}
    outcome = train(dataclasses.replace(made, evaluate=lambda step: Evaluation(losses[step], 0.0, 1)), first_state(60))
    close_run(made)
    assert outcome.reason == "no gain" and outcome.state.step == 4
    assert outcome.state.best_loss == 2.0 and outcome.state.best_step == 2 and outcome.state.evaluations_without_gain == 2
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-4"}


def failing(plan: RunOptions, *steps: int) -> Callable:
    def save(state):
        if state.step in steps:
            raise CheckpointError(Problem(code="checkpoint.not-written", message="the disk is full"))
        return plan.folder / f"checkpoint-{state.step}"

    return save


def test_a_save_that_fails_is_told_and_training_goes_on(llama: Path, tmp_path: Path) -> None:
    plan = plan_in(tmp_path, save_every="1 step")
    plan.save = failing(plan, 2)
    outcome = run(make_learner(llama, "lora"), plan)
    assert outcome.reason == "finished" and any("the disk is full: training goes on" in text for text in plan.progress.warnings)
    assert [event["step"] for event in lines(plan, "events.jsonl") if event["kind"] == "save-failed"] == [2]


def test_a_last_save_that_fails_is_an_error(llama: Path, tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    plan.save = failing(plan, 6)
    with pytest.raises(CheckpointError):
        run(make_learner(llama, "lora"), plan)


def test_what_is_on_disk_at_a_save_covers_all_its_steps(llama: Path, tmp_path: Path) -> None:
    """A resumed run does not repeat them, so they must have been written."""
    plan, written = plan_in(tmp_path, save_every="3 steps", log_every="100 steps"), {}

    def save(state):
        written[state.step] = [line["step"] for line in lines(plan, "metrics.jsonl")]
        return tmp_path

    plan.save = save
    run(make_learner(llama, "lora"), plan)
    assert written == {3: [1, 3], 6: [1, 3, 6]}
