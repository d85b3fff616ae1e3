"""Background saves: one at a time, reported in the thread of the loop, never lost, and the loop waits for the last one."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.models import examples_of, save_tiny
from tests.support.runs import RunOptions, close_run, make_learner, make_run, table_of

from llamahome.checkpoint.state import TrainerState
from llamahome.errors import CheckpointError, Problem
from llamahome.training.checkpointing import ReportSave
from llamahome.training.loop import train
from llamahome.training.run import first_state

ROWS = table_of(examples_of([9, 25, 14, 3, 30, 7, 18, 11, 22, 6], seed=1))


class Disk:
    """Saves slowly in a thread, fails at the given steps, and records in which thread each save was reported."""

    def __init__(self, folder: Path, thread: ThreadPoolExecutor, faults: dict[int, Exception]) -> None:
        self.folder, self.thread, self.faults = folder, thread, faults
        self.writing: list[int] = []
        self.most = 0
        self.reported: list[tuple[int, threading.Thread]] = []
        self.order: list[str] = []

    def write(self, step: int) -> ReportSave:
        self.writing.append(step)
        self.most = max(self.most, len(self.writing))
        time.sleep(0.05)
        self.writing.remove(step)
        if step in self.faults:
            raise self.faults[step]
        self.order.append(f"async {step}")

        def report() -> Path:
            self.reported.append((step, threading.current_thread()))
            return self.folder / f"checkpoint-{step}"

        return report

    def save_async(self, state: TrainerState) -> "Future[ReportSave]":
        assert not self.writing, "the save before is under way"
        return self.thread.submit(self.write, state.step)

    def save(self, state: TrainerState) -> Path:
        assert not self.writing, "the save before is under way"
        self.order.append(f"waited {state.step}")
        return self.folder / f"checkpoint-{state.step}"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    with ThreadPoolExecutor(1) as thread:
        yield lambda **faults: Disk(tmp_path, thread, {int(name[1:]): error for name, error in faults.items()})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def run(llama: Path, plan: RunOptions, disk: Disk) -> Path | None:
    plan.save, plan.save_async = disk.save, disk.save_async
    made = make_run(make_learner(llama, "lora"), plan)
    try:
        return train(made, first_state(plan.micro_batch_tokens)).checkpoint
    finally:
        close_run(made)


def failures(plan: RunOptions) -> list[int]:
    path = plan.folder / "metrics/events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event["step"] for event in events if event["kind"] == "save-failed"]


def full() -> CheckpointError:
    return CheckpointError(Problem(code="checkpoint.write-failed", message="the disk is full"))


def test_background_saves_are_one_at_a_time_told_by_the_loop_and_the_last_is_waited_for(llama: Path, tmp_path: Path, disk) -> None:
    plan, own = RunOptions(ROWS, tmp_path, save_every="2 steps"), disk()
    assert run(llama, plan, own) == tmp_path / "checkpoint-6"
    assert own.most == 1 and own.order == ["async 2", "async 4", "waited 6"]
    assert own.reported == [(2, threading.current_thread()), (4, threading.current_thread())]
    assert plan.progress.warnings == [] and failures(plan) == []


def test_a_save_that_fails_in_the_background_is_told_and_training_goes_on(llama: Path, tmp_path: Path, disk) -> None:
    plan, own = RunOptions(ROWS, tmp_path, save_every="2 steps"), disk(s4=full())
    assert run(llama, plan, own) == tmp_path / "checkpoint-6"
    assert own.order == ["async 2", "waited 6"] and failures(plan) == [4]
    assert plan.progress.warnings == ["the disk is full: training goes on; the checkpoint before this one is untouched"]


def test_another_error_of_the_thread_is_raised_in_the_loop(llama: Path, tmp_path: Path, disk) -> None:
    with pytest.raises(ZeroDivisionError):
        run(llama, RunOptions(ROWS, tmp_path, save_every="2 steps"), disk(s2=ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run(llama, RunOptions(ROWS, tmp_path, save_every="5 steps"), disk(s5=ZeroDivisionError()))


def test_a_run_that_ends_with_an_error_waits_for_what_is_under_way(llama: Path, tmp_path: Path, disk) -> None:
    plan, own, calls = RunOptions(ROWS, tmp_path, save_every="2 steps"), disk(), [0]
    learner = make_learner(llama, "lora")

    def objective(batch):
        calls[0] += batch.index == 0
        if calls[0] == 3:
            raise ArithmeticError
        return learner.objective.loss_sum(batch)

    plan.objective = objective
    with pytest.raises(ArithmeticError):
        run(llama, plan, own)
    assert own.order == ["async 2"] and [step for step, _ in own.reported] == [2]


def test_a_request_to_stop_while_a_save_is_under_way_waits_and_saves_its_own_step(llama: Path, tmp_path: Path, disk) -> None:
    plan, own = RunOptions(ROWS, tmp_path, save_every="2 steps"), disk()
    began = own.save_async

    def save_async(state: TrainerState) -> "Future[ReportSave]":
        plan.stop.asked = True
        return began(state)

    own.save_async = save_async
    assert run(llama, plan, own) == tmp_path / "checkpoint-3" and own.order == ["async 2", "waited 3"]


def test_a_save_that_cannot_begin_in_the_background_is_told_and_training_goes_on(llama: Path, tmp_path: Path, disk) -> None:
    plan, own = RunOptions(ROWS, tmp_path, save_every="2 steps"), disk()

    def save_async(state: TrainerState) -> "Future[ReportSave]":
        raise full()

    own.save_async = save_async
    assert run(llama, plan, own) == tmp_path / "checkpoint-6"
    assert own.order == ["waited 6"] and failures(plan) == [2, 4]
