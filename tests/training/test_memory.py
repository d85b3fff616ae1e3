"""Memory that runs out in an update, an evaluation or a pass of a processor costs no step, and more is tried again later."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from tests.support.models import examples_of, save_tiny
from tests.support.runs import ALONE, Learner, RunOptions, close_run, make_learner, make_run, table_of
from torch import nn

from llamahome.data.steps.loader import stay
from llamahome.data.text.tokens import load_tokenizer
from llamahome.errors import OutOfMemory
from llamahome.model.shard import replicated
from llamahome.monitoring.recorder import Recorder
from llamahome.training.evaluate import Evaluation, Evaluator, HeldOut, sample_prompts
from llamahome.training.loop import train
from llamahome.training.memory import update_weights
from llamahome.training.memory_watch import MemoryWatch
from llamahome.training.run import first_state

MIB = 2**20
ROWS = table_of(examples_of([9, 25, 14, 3, 30, 7, 18, 11, 22, 6], seed=1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def events(folder: Path, kind: str) -> list[dict]:
    path = folder / "metrics/events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for line in lines if (event := json.loads(line))["kind"] == kind]


def trained(learner: Learner, plan: RunOptions):
    run = make_run(learner, plan)
    try:
        return train(run, first_state(plan.micro_batch_tokens)).state
    finally:
        close_run(run)


def same(one: Learner, other: Learner) -> bool:
    found, expected = (torch.cat([weight.flatten() for weight in each.weights().values()]) for each in (one, other))
    return bool((found - expected).norm() <= 1e-6 * expected.norm())


def no_memory(*_: object) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_update_without_memory_is_done_again_and_later_passes_are_smaller(llama: Path, tmp_path: Path, method) -> None:
    roomy, tight = make_learner(llama, method), make_learner(llama, method)
    trained(roomy, RunOptions(ROWS, tmp_path / "roomy", steps=4))
    calls = []

    def once(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            no_memory()

    tight.optimizer.register_step_pre_hook(once)
    state = trained(tight, RunOptions(ROWS, tmp_path / "tight", steps=4))
    assert len(calls) == 5 and state.step == 4 and state.micro_batch_tokens == 30 and same(tight, roomy)
    assert [(event["step"], event["micro_batch_tokens"]) for event in events(tmp_path / "tight", "out-of-memory")] == [(2, 30)]


def test_an_update_that_has_changed_weights_is_not_done_twice(llama: Path) -> None:
    learner = make_learner(llama, "full")
    for weight in learner.parameters.values():
        weight.grad = torch.ones_like(weight)
    learner.optimizer.register_step_post_hook(no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        update_weights(learner.optimizer)


def test_a_larger_budget_is_tried_again_and_after_a_longer_pause_each_time(llama: Path, tmp_path: Path) -> None:
    """Until it fits: here memory is short up to step 9."""
    learner, done = make_learner(llama, "lora"), [0]
    learner.optimizer.register_step_post_hook(lambda *_: done.__setitem__(0, done[0] + 1))

    def objective(batch):
        if batch.num_tokens > 40 and done[0] < 9:
            no_memory()
        return learner.objective.loss_sum(batch)

    state = trained(learner, RunOptions(ROWS, tmp_path, steps=24, objective=objective, settings={"retry_memory_after": 2}))
    lowered, tried = ([event["step"] for event in events(tmp_path, kind)] for kind in ("out-of-memory", "more-memory-tried"))
    assert state.step == 24 and state.micro_batch_tokens == 60
    assert lowered[0] == 1 and tried[0] == 3 and len(lowered) >= 2 and tried[-1] > 9
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried) if later <= 10]
    assert gaps == sorted(gaps)


def evaluator_of(learner: Learner, folder: Path, lengths: list[int], *, prompts: int = 0) -> tuple[Evaluator, Recorder]:
    facts = {"tensorboard_dir": None, "is_main": True, "resume_step": None, "flops_per_token": 1.0, "peak_flops": None}
    recorder = Recorder(folder / "metrics", warn=pytest.fail, **facts)
    placement, held_out = replicated(learner.model, ALONE), HeldOut(table_of(examples_of(lengths)), 80, ALONE, stay)
    tokenizer = load_tokenizer(learner.base) if prompts else None
    asked = sample_prompts(held_out.table, tokenizer, prompts) if tokenizer is not None else []
    return Evaluator(learner.objective, placement, tokenizer, recorder, held_out=held_out, prompts=asked), recorder


@pytest.mark.parametrize("room", [55, 41])
def test_an_evaluation_without_memory_is_done_in_smaller_passes(llama: Path, tmp_path: Path, room: int) -> None:
    learner = make_learner(llama, "lora")
    evaluator, recorder = evaluator_of(learner, tmp_path, [20, 40, 8, 33, 12])
    expected = evaluator.evaluate(0)
    learner.model.model.layers[1].register_forward_pre_hook(lambda _, inputs: no_memory() if inputs[0].shape[-2] > room else None)
    found = [evaluator.evaluate(step) for step in (1, 2)]
    recorder.close()
    for each in found:
        assert isinstance(each, Evaluation) and each.targets == expected.targets and each.loss == pytest.approx(expected.loss, rel=1e-6)
    short = events(tmp_path, "out-of-memory")
    assert {event["step"] for event in short} == {1} and {event["during"] for event in short} == {"evaluation"}


@pytest.mark.medium
def test_answers_without_memory_are_generated_one_at_a_time(llama: Path, tmp_path: Path) -> None:
    learner = make_learner(llama, "lora")
    evaluator, recorder = evaluator_of(learner, tmp_path, [20, 40, 8, 33, 12], prompts=3)
    evaluator.evaluate(0)
    learner.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: no_memory() if inputs[0].shape[0] > 1 else None)
    evaluator.evaluate(1)
    recorder.close()
    assert len(evaluator.samples()) == 3 and all(sample.before == sample.after != "" for sample in evaluator.samples())
    assert {(event["step"], event["during"]) for event in events(tmp_path, "out-of-memory")} == {(1, "answers")}


def test_an_example_that_cannot_be_evaluated_alone_ends_the_evaluation(llama: Path, tmp_path: Path) -> None:
    learner = make_learner(llama, "lora")
    evaluator, recorder = evaluator_of(learner, tmp_path, [20, 40])
    learner.model.model.layers[0].register_forward_pre_hook(no_memory)
    with pytest.raises(OutOfMemory, match="single example"):
        evaluator.evaluate(1)
    recorder.close()


class Machine:
    """A machine with `free` bytes, of which each layer of a pass takes `per_token` for each token until the pass ends."""

    def __init__(self, free: int, per_token: int) -> None:
        self.free, self.per_token, self.taken, self.time = free, per_token, 0, 0.0

    def clock(self) -> float:
        self.time += 1.0
        return self.time

    def read(self) -> int:
        return self.free - self.taken

    def take(self, _: nn.Module, inputs: tuple) -> None:
        self.taken += inputs[0].shape[-2] * self.per_token
        assert self.taken <= self.free, "the kernel would have ended the process"


def test_passes_become_smaller_before_memory_is_gone(llama: Path, tmp_path: Path) -> None:
    learner, machine = make_learner(llama, "lora"), Machine(100 * MIB, per_token=MIB)
    watch = MemoryWatch(machine.read, limit=200 * MIB, clock=machine.clock)
    watched = watch.around(learner.objective.loss_sum, learner.model.model.layers)
    for layer in learner.model.model.layers:
        layer.register_forward_pre_hook(machine.take)

    def objective(batch):
        machine.taken = 0
        return watched(batch)

    state = trained(learner, RunOptions(ROWS, tmp_path, steps=4, objective=objective))
    assert state.step == 4 and state.micro_batch_tokens < 60 and events(tmp_path, "out-of-memory")
    roomy = make_learner(llama, "lora")
    trained(roomy, RunOptions(ROWS, tmp_path / "roomy", steps=4))
    assert same(learner, roomy)


def test_a_single_example_is_never_refused_for_what_may_happen(llama: Path, tmp_path: Path) -> None:
    learner, machine = make_learner(llama, "lora"), Machine(MIB, per_token=0)
    watch = MemoryWatch(machine.read, limit=200 * MIB, clock=machine.clock)
    plan = RunOptions(ROWS, tmp_path, steps=2, objective=watch.around(learner.objective.loss_sum, learner.model.model.layers))
    assert trained(learner, plan).step == 2
