"""N steps in one go are k steps, a save, fresh objects, a restore and N - k steps, bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.models import examples_of, save_tiny
from tests.support.runs import Learner, Method, RunOptions, close_run, make_learner, make_run, table_of

from llamahome.training.loop import train
from llamahome.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from llamahome.training.run import first_state

ROWS = table_of(examples_of([9, 25, 14, 3, 30, 7, 18, 11, 22, 6], seed=1))
STEPS = 7
CASES = [
    ("lora", {"dropout": 0.3}),
    ("lora", {"use_dora": True}),
    ("lora", {"use_vera": True}),
    ("lora", {"checkpointing": True, "dropout": 0.2}),
    ("full", {}),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def everything(learner: Learner) -> dict[str, torch.Tensor]:
    return learner.weights() | {name: tensor.clone() for name, tensor in optimizer_tensors(learner.optimizer, learner.parameters).items()}


@pytest.mark.parametrize(("method", "settings"), CASES, ids=str)
@pytest.mark.parametrize("cut_at", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_run(llama: Path, tmp_path: Path, method: Method, settings: dict, cut_at: int) -> None:
    straight = make_learner(llama, method, weight_decay=0.1, **settings)
    run = make_run(straight, RunOptions(ROWS, tmp_path / "straight", steps=STEPS, save_every=f"{cut_at} steps"))
    expected_state = train(run, first_state(60)).state
    close_run(run)

    torch.manual_seed(99)  # another process has another generator, other ids, and another adapter to begin with
    again = make_learner(llama, method, seed=5, weight_decay=0.1, **settings)
    again.restore(tmp_path / f"straight/checkpoint-{cut_at}")
    state = first_state(60)
    state = type(state)(**{**vars(state), "step": cut_at, "consumed": 4 * cut_at})
    run = make_run(again, RunOptions(ROWS, tmp_path / "again", steps=STEPS, start=state.consumed))
    state = train(run, state).state
    close_run(run)

    expected, found = everything(straight), everything(again)
    assert expected.keys() == found.keys() and len(expected) >= 4 * len(straight.parameters)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (state.step, state.consumed) == (expected_state.step, expected_state.consumed) == (STEPS, 4 * STEPS)


def test_state_is_named_after_weights_and_holds_float32_tensors_alone(llama: Path, tmp_path: Path) -> None:
    learner = make_learner(llama, "lora")
    assert optimizer_tensors(learner.optimizer, learner.parameters) == {}
    run = make_run(learner, RunOptions(ROWS, tmp_path, steps=1))
    train(run, first_state(60))
    close_run(run)
    saved = load_file(tmp_path / "checkpoint-1/optimizer.safetensors")
    assert set(saved) == {f"{name}.{key}" for name in learner.parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_state_of_a_weight_that_is_missing_is_named(llama: Path) -> None:
    learner = make_learner(llama, "lora")
    name = next(iter(learner.parameters))
    with pytest.raises(KeyError, match=name):
        restore_optimizer(learner.optimizer, learner.parameters, {"another.step": torch.zeros(())})
    restore_optimizer(learner.optimizer, learner.parameters, {})
    assert not learner.optimizer.state


def test_what_is_restored_is_a_copy_where_a_first_step_would_have_put_it() -> None:
    """The fused update needs the count of steps on the device of the weight; meta is the one other device that every machine has."""
    weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([weight], fused=False)
    saved = {"w.step": torch.tensor(4.0), "w.exp_avg": torch.ones(3), "w.exp_avg_sq": torch.ones(3)}
    restore_optimizer(optimizer, {"w": weight}, saved)
    assert {key: value.device.type for key, value in optimizer.state[weight].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }
    here = torch.nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer("adamw", {"w": here}, weight_decay=0.0)
    restore_optimizer(optimizer, {"w": here}, saved)
    here.grad = torch.ones(3)
    optimizer.step()
    assert saved["w.step"] == 4 and torch.equal(saved["w.exp_avg"], torch.ones(3)) and optimizer.state[here]["step"] == 5
