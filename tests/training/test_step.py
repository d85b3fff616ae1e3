"""A step equals a plain PyTorch step over the whole batch, however it is split; a loss or gradient that is not finite changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tests.support.models import examples_of, plain_loss, save_tiny
from tests.support.runs import ALONE, Learner, Method, make_learner
from torch import Tensor
from transformers import AutoModelForCausalLM

from llamahome.data.records import Example, Microbatch
from llamahome.data.steps.batching import divide
from llamahome.data.steps.loader import make_microbatch
from llamahome.distributed.reducer import FlatReducer
from llamahome.model.lora import quiet_peft
from llamahome.monitoring.throughput import PartClock
from llamahome.training.optimizer import set_learning_rate
from llamahome.training.spikes import Limits
from llamahome.training.step import StepResult, microbatch_seed, step_seed, train_step

LENGTHS = (31, 18, 18, 9, 40, 2, 1, 13)
METHODS = ("lora", "full")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def cut(examples: list[Example], budget: int) -> list[Microbatch]:
    (packs,) = divide([len(example.tokens) for example in examples], world_size=1, micro_batch_tokens=budget)
    return [make_microbatch([examples[i] for i in pack], keys=pack, index=n) for n, pack in enumerate(packs)]


def step(learner: Learner, microbatches: list[Microbatch], *, rate: float = 1e-3, clip: float | None = 1.0, **changes) -> StepResult:
    set_learning_rate(learner.optimizer, rate)
    given = {
        "divisors": [sum(each.num_targets for each in microbatches)],
        "seed": step_seed(0, 0),
        "limits": Limits(clip),
        "reducer": FlatReducer(ALONE, list(learner.parameters.values())),
        "clock": PartClock(),
    }
    return train_step(changes.pop("objective", learner.objective.loss_sum), learner.optimizer, microbatches, **{**given, **changes})


def moved(learner: Learner) -> Learner:
    """With values in the B matrices, which start at zero."""
    random = torch.Generator().manual_seed(1)
    for name, parameter in learner.parameters.items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return learner


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative, over all weights together."""
    assert found.keys() == expected.keys()
    both = [torch.cat([tensors[name].flatten().double() for name in expected]) for tensors in (found, expected)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_any_cut_into_micro_batches_gives_the_same_step(llama: Path, method: Method, clip: float | None) -> None:
    found = []
    for budget in (1, 20, 45, 70, 1000):
        learner, microbatches = moved(make_learner(llama, method)), cut(examples_of(LENGTHS), budget)
        result = step(learner, microbatches, clip=clip)
        found.append((len(microbatches), result.loss, result.grad_norm, learner.gradients_of_first_step(), learner.weights()))
    assert len({number for number, *_ in found}) >= 4
    _, loss, norm, gradients, weights = found[-1]
    for _, other_loss, other_norm, other_gradients, other_weights in found[:-1]:
        assert abs(other_loss - loss) <= 1e-6 * loss and abs(other_norm - norm) <= 1e-6 * norm
        assert distance(other_gradients, gradients) <= 1e-6 and distance(other_weights, weights) <= 1e-6


@settings(deadline=None, max_examples=10)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), budget=st.integers(1, 90), seed=st.integers(0, 5))
def test_any_batch_in_any_cut_has_the_loss_of_all_its_targets(llama: Path, lengths: list[int], budget: int, seed: int) -> None:
    examples = [*examples_of(lengths, seed=seed), *examples_of([6])]
    unsplit, split = (step(make_learner(llama, "lora"), cut(examples, tokens)).loss for tokens in (10_000, budget))
    assert abs(unsplit - split) <= 1e-6 * unsplit


def plain_steps(
    folder: Path, method: Method, batches: list[list[Example]], *, rate: float, clip: float | None, decay: float
) -> list[Tensor]:
    """The same steps in plain PyTorch: all logits, one example at a time, PEFT's own layers, the default AdamW."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if method == "lora":
        torch.manual_seed(0)
        with quiet_peft():
            model = get_peft_model(model, PeftLoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear"))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for _, parameter in trained if parameter.ndim >= 2], "weight_decay": decay},
        {"params": [parameter for _, parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=False, foreach=False)
    results = []
    for examples in batches:
        targets = sum(int(example.targets.sum()) for example in examples)
        loss = sum(plain_loss(model, example) for example in examples if example.targets.any()) / targets
        loss.backward()
        parameters = [parameter for _, parameter in trained]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        results += [loss.detach(), norm]
    return [*results, torch.cat([parameter.detach().flatten() for _, parameter in trained])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_equal_plain_pytorch(llama: Path, method: Method, clip: float | None) -> None:
    batches = [examples_of(LENGTHS, seed=seed) for seed in range(3)]
    learner, ours = make_learner(llama, method, weight_decay=0.1), []
    for examples in batches:
        result = step(learner, cut(examples, 45), rate=1e-2, clip=clip)
        ours += [result.loss, result.grad_norm]
    theirs = plain_steps(llama, method, batches, rate=1e-2, clip=clip, decay=0.1)
    for found, expected in zip(ours, theirs[:-1], strict=True):
        assert abs(found - expected) <= 1e-5 * expected
    found = torch.cat([weight.flatten() for weight in learner.weights().values()])
    # Adam divides by the root of the second moment: where a gradient is next to nothing, rounding decides its sign.
    assert (found - theirs[-1]).norm() <= 1e-4 * theirs[-1].norm()


def not_a_loss(learner: Learner) -> Callable[[Microbatch], Tensor]:
    return lambda batch: learner.objective.loss_sum(batch) * float("inf")


def not_a_gradient(learner: Learner) -> Callable[[Microbatch], Tensor]:
    weight = next(iter(learner.parameters.values()))
    return lambda batch: learner.objective.loss_sum(batch) + (0 * weight.sum()).sqrt()  # 0, with a slope of 0 * infinity


def state_of(learner: Learner) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, parameter in learner.parameters.items()
        for key, value in learner.optimizer.state[parameter].items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trouble", [not_a_loss, not_a_gradient])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_what_is_not_finite_changes_no_bit(llama: Path, method: Method, trouble: Callable, clip: float | None) -> None:
    batch = cut(examples_of(LENGTHS), 45)
    learner, spared = (make_learner(llama, method, weight_decay=0.1) for _ in range(2))
    for each in (learner, spared):
        assert step(each, batch, clip=clip).refused == 0
    weights, state = learner.weights(), state_of(learner)
    result = step(learner, batch, clip=clip, objective=trouble(learner))
    assert result.refused == 1 and not (result.loss.isfinite() and result.grad_norm.isfinite())
    assert bool(result.loss.isfinite()) is (trouble is not_a_gradient)
    assert all(parameter.grad is None for parameter in learner.parameters.values())
    for name, weight in learner.weights().items():
        assert torch.equal(weight, weights[name])
    for name, value in state_of(learner).items():
        assert torch.equal(value, state[name]), name
    after, expected = step(learner, batch, clip=clip), step(spared, batch, clip=clip)
    assert torch.equal(after.loss, expected.loss)
    for name, weight in learner.weights().items():
        assert torch.equal(weight, spared.weights()[name])


@pytest.mark.parametrize("trouble", [not_a_loss, not_a_gradient])
def test_a_first_step_that_is_not_finite_leaves_a_fresh_optimizer(llama: Path, trouble: Callable) -> None:
    batch = cut(examples_of(LENGTHS), 45)
    learner, spared = (make_learner(llama, "lora") for _ in range(2))
    step(learner, batch, objective=trouble(learner))
    assert not any(value.any() for value in state_of(learner).values())
    step(learner, batch), step(spared, batch)
    for name, weight in learner.weights().items():
        assert torch.equal(weight, spared.weights()[name])


def test_a_rank_without_micro_batches_takes_part(llama: Path) -> None:
    learner = make_learner(llama, "lora")
    before = learner.weights()
    result = step(learner, [], divisors=[17])
    assert result.loss == 0 and result.grad_norm == 0 and result.refused == 0
    assert all(torch.equal(weight, before[name]) for name, weight in learner.weights().items())


def test_dropout_comes_from_its_seed_whatever_happened_before(llama: Path) -> None:
    batch, found = cut(examples_of(LENGTHS), 45), []
    for noise in range(2):
        torch.manual_seed(noise)
        learner = make_learner(llama, "lora", dropout=0.5)
        step(learner, batch)
        found.append(learner.weights())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    other = make_learner(llama, "lora", dropout=0.5)
    step(other, batch, seed=step_seed(0, 1))
    assert distance(other.weights(), found[0]) > 0


def test_seeds_differ_between_steps_micro_batches_and_runs() -> None:
    """Also in their low 32 bits: torch's generator on processors starts from those alone."""
    seeds = [microbatch_seed(step_seed(seed, step), index) for seed in range(5) for step in range(200) for index in range(20)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed & 0xFFFF_FFFF for seed in seeds}) == len(seeds)
    assert microbatch_seed(step_seed(2**63 - 1, 10**9), 10**6) < 2**63
