"""Evaluation is one mean over all targets, and leaves no trace in the model."""

import math

import pytest
import torch
from tests.support.models import examples_of, plain_loss, plain_model, save_tiny
from tests.support.runs import ALONE, Learner, make_learner, table_of
from torch.utils._python_dispatch import TorchDispatchMode

from llamahome.data.steps.loader import sequential_microbatches
from llamahome.training.evaluate import Evaluation, evaluate

EXAMPLES = examples_of([20, 3, 14, 1, 31, 2], seed=4)


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    return make_learner(save_tiny(tmp_path_factory.mktemp("llama"), "llama"), "lora", dropout=0.5)


def evaluated(learner: Learner, budget: int) -> Evaluation:
    batches = sequential_microbatches(table_of(EXAMPLES), micro_batch_tokens=budget)
    return evaluate(learner.objective.stats, learner.model, batches, world=ALONE)


@pytest.mark.parametrize("budget", [1, 25, 1000])
def test_it_is_the_mean_over_all_targets_of_a_plain_loop(learner: Learner, budget: int) -> None:
    plain, found = plain_model("llama"), evaluated(learner, budget)
    targets = sum(int(example.targets.sum()) for example in EXAMPLES)
    with torch.no_grad():
        loss = sum(float(plain_loss(plain, example)) for example in EXAMPLES if example.targets.any()) / targets
    assert found.targets == targets and found.loss == pytest.approx(loss, rel=1e-6)
    assert found.metrics == {"eval/loss": found.loss, "eval/perplexity": found.perplexity, "eval/token_accuracy": found.accuracy}
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5) and 0 <= found.accuracy <= 1


@pytest.mark.parametrize("training", [True, False])
def test_mode_generator_and_gradients_are_left_as_they_were(learner: Learner, training: bool) -> None:
    learner.model.train(training)
    before = torch.random.get_rng_state()
    first, second = evaluated(learner, 25), evaluated(learner, 25)
    assert first == second, "dropout was on"
    assert all(module.training == training for module in learner.model.modules())
    assert torch.equal(torch.random.get_rng_state(), before) and all(p.grad is None for p in learner.model.parameters())


def test_no_number_is_float64_while_the_model_runs(learner: Learner) -> None:
    """MPS has no such numbers; what was added up on the host afterwards may be."""
    wide: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                wide.append(str(func))
            return made

    batches = sequential_microbatches(table_of(EXAMPLES), micro_batch_tokens=25)
    left = len(batches)

    def stats(batch):
        nonlocal left
        found = learner.objective.stats(batch)
        left -= 1
        assert not wide, wide
        return found

    with Watch():
        evaluate(stats, learner.model, batches, world=ALONE)
    assert left == 0 and wide


def test_the_mode_is_given_back_when_something_breaks(learner: Learner) -> None:
    learner.model.train()
    with pytest.raises(ZeroDivisionError):
        evaluate(lambda batch: 1 // 0, learner.model, sequential_microbatches(table_of(EXAMPLES), micro_batch_tokens=9), world=ALONE)
    assert learner.model.training


def test_nothing_to_evaluate_is_no_division_by_zero(learner: Learner) -> None:
    assert evaluate(learner.objective.stats, learner.model, [], world=ALONE) == Evaluation(0.0, 0.0, 0)


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert Evaluation(1e4, 0.0, 1).perplexity == math.inf
