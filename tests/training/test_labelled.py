"""The loss of KTO equals a plain implementation, whatever the layout; its reference point comes from the step before."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.gradients import distance
from tests.support.labelled import ROWS, labelled_table, plain_kto
from tests.support.models import objective_of, our_model, plain_model, save_tiny
from torch import nn

from llamahome.config.preference import PreferenceConfig
from llamahome.data.steps.layout import idle_microbatch
from llamahome.data.steps.loader import sequential_microbatches
from llamahome.training.labelled import MEASURED, LabelledObjective, ReferencePoint

SETTINGS = {"defaults": PreferenceConfig(), "all": PreferenceConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.25)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


def ours(folder: Path, settings: PreferenceConfig, *, point: float = 0.0, budget: int = 40, backend: str = "cpu"):
    """What the step measures, all gradients of a model whose every weight is trained, and the number of micro-batches."""
    objective = LabelledObjective(settings, objective_of(our_model(folder).requires_grad_(True), backend))
    objective.point.restore(point)
    batches, found = sequential_microbatches(labelled_table(), micro_batch_tokens=budget), []
    units = torch.tensor([objective.units(batch) for batch in batches]).sum(0)
    assert units.tolist() == [5] * (len(MEASURED) - 1) + [3, 2]
    for batch in batches:
        sums = objective.loss_sum(batch) / units
        sums[0].backward()
        found.append(sums.detach())
    return torch.stack(found).sum(0), gradients(objective.model), len(batches)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("point", [0.0, 4.0])
def test_loss_and_gradients_equal_a_plain_implementation(folder: Path, case: str, name: str, point: float) -> None:
    plain = plain_model("llama").requires_grad_(True)
    expected, then = plain_kto(plain, labelled_table(), SETTINGS[case], point)
    expected.backward()
    sums, grads, _ = ours(folder, SETTINGS[case], point=point, backend=name)
    torch.testing.assert_close(sums[0], expected.detach(), rtol=1e-5, atol=1e-6)
    assert distance(grads, gradients(plain)) <= 1e-5
    next_point = ReferencePoint()
    next_point.note(sums[1:])
    assert next_point.values() == pytest.approx(then, rel=1e-5, abs=1e-5)


def test_answers_packed_together_give_the_step_of_each_alone(folder: Path) -> None:
    alone, packed = (ours(folder, SETTINGS["all"], point=2.0, budget=budget) for budget in (1, 10_000))
    assert (alone[2], packed[2]) == (len(ROWS), 1)
    torch.testing.assert_close(alone[0], packed[0], rtol=1e-5, atol=1e-6)
    assert distance(alone[1], packed[1]) <= 1e-5


def test_what_is_measured_is_what_the_labels_say(folder: Path) -> None:
    sums, _, _ = ours(folder, SETTINGS["defaults"], point=3.0)
    measured = dict(zip(MEASURED, sums[1:].tolist(), strict=True))
    assert measured["reference_point"] == pytest.approx(3.0)
    mean = (3 * measured["good_reward"] + 2 * measured["bad_reward"]) / 5
    assert 0.1 * measured["log_ratio"] == pytest.approx(mean, rel=1e-5)
    margin = (3 * (measured["good_reward"] - 0.3) + 2 * (0.3 - measured["bad_reward"])) / 5
    assert measured["reward_margin"] == pytest.approx(margin, rel=1e-5)


def test_an_evaluation_has_the_loss_of_the_first_step_whatever_the_reference_point(folder: Path) -> None:
    objective = LabelledObjective(SETTINGS["all"], objective_of(our_model(folder)))
    (batch,) = sequential_microbatches(labelled_table(), micro_batch_tokens=10_000)
    first = objective.loss_sum(batch).detach()
    objective.point.restore(1.5)
    stats, later = objective.stats(batch), objective.loss_sum(batch).detach()
    assert (float(stats.loss_sum), float(stats.correct)) == (float(first[0]), float(first[1]))
    assert objective.point.values() == 1.5 and float(later[0]) != float(first[0])


def test_the_reference_point_is_the_mean_gain_but_never_below_zero_and_ignores_what_is_not_finite() -> None:
    point, at = ReferencePoint(), MEASURED.index("log_ratio")

    def note(gain: float) -> float:
        point.note(torch.full((len(MEASURED),), 7.0).index_fill(0, torch.tensor(at), gain))
        return point.values()

    assert [note(0.3), note(float("nan")), note(float("inf"))] == [pytest.approx(0.3)] * 3
    saved = json.loads(json.dumps(point.values()))
    assert note(-2.0) == 0.0
    point.restore(saved)
    assert torch.equal(point.value, torch.tensor(0.3))
    point.restore(None)
    assert point.values() == 0.0


def test_an_idle_pass_gives_zeros_that_can_be_differentiated(folder: Path) -> None:
    objective = LabelledObjective(PreferenceConfig(), objective_of(our_model(folder).requires_grad_(True)))
    idle = idle_microbatch(index=3)
    sums = objective.loss_sum(idle)
    sums[0].backward()
    assert sums.tolist() == [0.0] * 7 and objective.units(idle) == (0,) * 7
    assert not any(p.grad.any() for p in objective.model.parameters() if p.grad is not None)


def test_the_loss_of_answers_far_from_the_reference_is_finite(folder: Path) -> None:
    objective = LabelledObjective(PreferenceConfig(), objective_of(our_model(folder)))
    table = replace(labelled_table(), known=np.tile(np.float32([-5000.0, 5000.0]), 3)[:5])
    (batch,) = sequential_microbatches(table, micro_batch_tokens=10_000)
    assert torch.isfinite(objective.loss_sum(batch)).all()
