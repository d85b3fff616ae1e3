"""float16 learns as float32 does; a step that overflows is done again with half the scale, on all ranks, and a resumed run scales alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.models import FP32, examples_of, microbatch_of, save_tiny
from tests.support.runs import ALONE, Learner, RunOptions, close_run, make_learner, make_run, table_of
from tests.support.workers import run_workers
from tests.training.scale_ranks import HALF
from torch import Tensor

from llamahome.checkpoint.state import TrainerState
from llamahome.data.records import Microbatch
from llamahome.distributed.reducer import FlatReducer
from llamahome.model.precision import Precision
from llamahome.monitoring.throughput import PartClock
from llamahome.training import loss_scale
from llamahome.training.loop import train
from llamahome.training.loss_scale import LossScale, Overflowed
from llamahome.training.optimizer import optimizer_tensors, set_learning_rate
from llamahome.training.run import first_state
from llamahome.training.spikes import NOT_FINITE, Limits
from llamahome.training.step import StepResult, train_step

ROWS = table_of(examples_of([12, 9, 15, 7, 20, 11, 8, 13, 10, 14], seed=4))
AUTOCAST = Precision(torch.float32, torch.float16, "a test")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", initializer_range=0.1)


def tried(learner: Learner, scale: LossScale | None, objective: Callable[[Microbatch], Tensor] | None = None) -> StepResult | Overflowed:
    """One try of a step."""
    set_learning_rate(learner.optimizer, 1e-3)
    batch = microbatch_of(examples_of((31, 18, 9)))
    parts = {"limits": Limits(None, scale=scale), "reducer": FlatReducer(ALONE, list(learner.parameters.values())), "clock": PartClock()}
    return train_step(objective or learner.objective.loss_sum, learner.optimizer, [batch], divisors=[batch.num_targets], seed=0, **parts)


def everything(learner: Learner) -> dict[str, Tensor]:
    return learner.weights() | {name: tensor.clone() for name, tensor in optimizer_tensors(learner.optimizer, learner.parameters).items()}


@pytest.mark.parametrize("precision", [HALF, AUTOCAST], ids=["stored", "autocast"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_and_gradient_are_near_those_of_float32(llama: Path, method: str, precision: Precision) -> None:
    if method == "full" and precision is HALF:
        pytest.skip("trained weights are float32")
    exact, half = (
        tried(make_learner(llama, method, precision=each), LossScale() if each is not FP32 else None) for each in (FP32, precision)
    )
    assert float(half.loss) == pytest.approx(float(exact.loss), rel=2e-3)
    assert float(half.grad_norm) == pytest.approx(float(exact.grad_norm), rel=2e-2)


def test_small_gradients_survive_with_a_scale_only(llama: Path) -> None:
    norms = []
    for scale in (None, LossScale()):
        learner = make_learner(llama, "lora", precision=HALF)
        result = tried(learner, scale, lambda batch, learner=learner: learner.objective.loss_sum(batch) * 1e-6)
        norms.append(float(result.grad_norm))
    exact = make_learner(llama, "lora")
    expected = float(tried(exact, None, lambda batch: exact.objective.loss_sum(batch) * 1e-6).grad_norm)
    assert norms[1] == pytest.approx(expected, rel=2e-2) and abs(norms[0] - expected) > 0.1 * expected


def test_an_overflow_changes_nothing_and_the_step_is_done_again_with_half_the_scale(llama: Path) -> None:
    learner, scale = make_learner(llama, "lora", precision=HALF), LossScale({"scale": 2.0**22, "good_steps": 5, "overflows": 0})
    before, tries = learner.weights(), 0
    while isinstance(result := tried(learner, scale), Overflowed):
        tries += 1
        assert result.scale == 2 * scale.scale and scale.good_steps == 0
        assert all(torch.equal(learner.weights()[name], value) for name, value in before.items()) and not learner.optimizer.state
    assert tries == scale.overflows > 0 and scale.scale == 2.0 ** (22 - tries) and scale.good_steps == 1
    other = make_learner(llama, "lora", precision=HALF)
    again = tried(other, LossScale({"scale": scale.scale, "good_steps": 0, "overflows": 0}))
    assert isinstance(again, StepResult) and torch.equal(again.grad_norm, result.grad_norm)
    assert all(torch.equal(value, everything(other)[name]) for name, value in everything(learner).items())


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale(llama: Path) -> None:
    learner, scale = make_learner(llama, "lora", precision=HALF), LossScale()
    result = tried(learner, scale, lambda batch: learner.objective.loss_sum(batch) * float("inf"))
    assert isinstance(result, StepResult) and float(result.refused) == NOT_FINITE and scale.scale == loss_scale.FIRST
    assert scale.good_steps == 0


def test_a_run_counts_overflows_grows_its_scale_and_resumes_bit_for_bit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 3)
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**22)

    def trained(learner: Learner, folder: Path, state: TrainerState) -> TrainerState:
        saved: dict[int, TrainerState] = {}

        def save(state: TrainerState) -> Path:
            saved[state.step] = state
            learner.save(folder / f"checkpoint-{state.step}")
            return folder / f"checkpoint-{state.step}"

        plan = RunOptions(ROWS, folder, steps=6, start=state.consumed, save_every="2 steps", save=save, settings={"scales_loss": True})
        run = make_run(learner, plan)
        states[folder.name] = saved
        try:
            return train(run, state).state
        finally:
            close_run(run)

    states: dict[str, dict[int, TrainerState]] = {}
    straight = make_learner(llama, "lora", precision=HALF)
    ended = trained(straight, tmp_path / "straight", first_state(60))
    again = make_learner(llama, "lora", seed=5, precision=HALF)
    again.restore(tmp_path / "straight/checkpoint-2")
    resumed = trained(again, tmp_path / "again", states["straight"][2])
    assert all(torch.equal(value, everything(again)[name]) for name, value in everything(straight).items())
    assert resumed.extra["loss_scale"] == ended.extra["loss_scale"] and ended.bad_steps == 0 and ended.step == 6
    events = [json.loads(line) for line in (tmp_path / "straight/metrics/events.jsonl").read_text().splitlines()]
    halved = [event["scale"] for event in events if event["kind"] == "loss-scale"]
    assert len(halved) == ended.extra["loss_scale"]["overflows"] > 0 and halved[0] == 2.0**21
    assert 0 < states["straight"][2].extra["loss_scale"]["good_steps"] < 3
    assert ended.extra["loss_scale"]["scale"] > 2.0**22 / 2 ** len(halved), "it has grown again"


@pytest.mark.medium
def test_an_overflow_on_one_rank_counts_on_all(tmp_path: Path) -> None:
    base = save_tiny(tmp_path, "llama", initializer_range=0.1)
    ranks = run_workers("tests/training/scale_ranks.py:overflows_on_the_last", 2, {"base": str(base)})
    assert repr(ranks[0]) == repr(ranks[1]), "the processes have drifted apart"
    assert ranks[0]["tries"] == 7 and ranks[0]["refused"] == 0
    assert ranks[0]["scale"] == {"scale": 1024.0, "good_steps": 1, "overflows": 6}
