"""Which weights decay, and that the rate is set for all."""

import pytest
import torch
from torch import nn

from llamahome.config.optimizers import OptimizerName
from llamahome.training.optimizer import make_optimizer, set_learning_rate


def test_matrices_decay_and_vectors_do_not_and_the_rate_is_set_for_all() -> None:
    weights = {"matrix": nn.Parameter(torch.ones(2, 3)), "vector": nn.Parameter(torch.ones(3))}
    optimizer = make_optimizer("adamw", weights, weight_decay=0.1)
    set_learning_rate(optimizer, 0.5)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(weights["matrix"], torch.tensor(1 - 0.5 * 0.1)) and torch.equal(weights["vector"], torch.ones(3))
    assert {group["lr"] for group in optimizer.param_groups} == {0.5} and all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_a_model_of_matrices_or_of_vectors_alone_is_fine(shape: tuple[int, ...]) -> None:
    optimizer = make_optimizer("adamw", {"only": nn.Parameter(torch.ones(shape))}, weight_decay=0.1)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "adafactor", "muon"])
def test_an_update_tells_that_the_weights_have_changed(kind: OptimizerName) -> None:
    weights = {"matrix": nn.Parameter(torch.ones(2, 3)), "vector": nn.Parameter(torch.ones(3))}
    optimizer = make_optimizer(kind, weights, weight_decay=0.0)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    before = [weight._version for weight in weights.values()]
    optimizer.step()
    assert all(weight._version > version for weight, version in zip(weights.values(), before, strict=True))
