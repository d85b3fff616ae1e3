"""Losses of pairs equal a plain implementation, whatever the layout; the prompt of a pair may be computed once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.gradients import distance
from tests.support.models import backend_named, objective_of, our_model, plain_model, save_tiny
from tests.support.pairs import SHAPES, pair_table, plain_step
from torch import nn

from llamahome.config.preference import PreferenceConfig
from llamahome.config.schema import LoraConfig
from llamahome.data.steps.layout import Layout, idle_microbatch
from llamahome.data.steps.loader import sequential_microbatches
from llamahome.model.lora import add_lora
from llamahome.training.preferences import LOSSES, PairObjective

SETTINGS = {
    "dpo": PreferenceConfig(),
    "dpo-all": PreferenceConfig(beta=0.5, label_smoothing=0.1, length_normalized=True, sft_weight=0.3),
    "ipo": PreferenceConfig(beta=0.2, sft_weight=0.5),
    "orpo": PreferenceConfig(beta=0.7),
    "simpo": PreferenceConfig(gamma=0.4, label_smoothing=0.2, sft_weight=0.1),
}
WRITTEN_OUT, SHARED = Layout(whole_rows=True), Layout(whole_rows=True, shares=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("llama", "mistral", "gemma2", "gpt2", "phi")
    return {kind: save_tiny(tmp_path_factory.mktemp(kind), kind) for kind in kinds}


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


def ours(folder: Path, case: str, layout: Layout, *, budget: int = 70, backend: str = "cpu"):
    """Sums over all pairs divided by their number, and all gradients of a model whose every weight is trained."""
    model = our_model(folder).requires_grad_(True)
    objective = PairObjective(case.split("-")[0], SETTINGS[case], objective_of(model, backend))
    table, found = pair_table(), []
    batches = sequential_microbatches(table, micro_batch_tokens=budget, layout=layout)
    units = sum(objective.units(batch)[0] for batch in batches)
    assert units == len(SHAPES)
    for batch in batches:
        sums = objective.loss_sum(batch) / units
        sums[0].backward()
        found.append(sums.detach())
    return torch.stack(found).sum(0), gradients(model), len(batches)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_loss_and_gradients_equal_a_plain_implementation(folders: dict[str, Path], case: str, name: str) -> None:
    plain = plain_model("llama").requires_grad_(True)
    expected, logprobs = plain_step(plain, pair_table(), case.split("-")[0], SETTINGS[case])
    expected.backward()
    for layout in (WRITTEN_OUT, SHARED):
        sums, grads, _ = ours(folders["llama"], case, layout, backend=name)
        torch.testing.assert_close(sums[0], expected.detach(), rtol=1e-5, atol=1e-6)
        assert distance(grads, gradients(plain)) <= 1e-5
        assert sums[3:].tolist() == pytest.approx(np.mean(logprobs, axis=0).tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "phi"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_prompt_computed_once_gives_the_step_of_both_written_out(folders: dict[str, Path], kind: str, name: str) -> None:
    both = [ours(folders[kind], "dpo", layout, backend=name) for layout in (WRITTEN_OUT, SHARED)]
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-5, atol=1e-6)
    assert distance(both[0][1], both[1][1]) <= 1e-5


def test_pairs_packed_together_give_the_step_of_each_alone(folders: dict[str, Path]) -> None:
    alone, packed = (ours(folders["llama"], "dpo", SHARED, budget=budget) for budget in (1, 10_000))
    assert (alone[2], packed[2]) == (len(SHAPES), 1)
    torch.testing.assert_close(alone[0], packed[0], rtol=1e-5, atol=1e-6)
    assert distance(alone[1], packed[1]) <= 1e-5


def test_a_shared_prompt_is_in_a_pass_once_and_counts_once(folders: dict[str, Path]) -> None:
    model, backend = our_model(folders["llama"]), backend_named("cpu")
    (batch,) = sequential_microbatches(pair_table(), micro_batch_tokens=10_000, layout=SHARED)
    laid = backend.make_pass(batch, model)
    prompts, answers = sum(prompt for prompt, *_ in SHAPES), sum(sum(both) for _, *both in SHAPES)
    assert len(laid.tokens_T) == prompts + answers and batch.num_tokens == 2 * prompts + answers
    fitting = max(prompt + good + bad for prompt, good, bad in SHAPES)
    batches = sequential_microbatches(pair_table(), micro_batch_tokens=fitting, layout=SHARED)
    assert all(len(backend.make_pass(each, model).tokens_T) <= fitting for each in batches)


def test_a_frozen_head_gets_no_gradient_and_adapters_get_that_of_the_plain_loss(folders: dict[str, Path]) -> None:
    found = []
    for layout in (WRITTEN_OUT, SHARED):
        model = our_model(folders["llama"])
        saved = add_lora(model, LoraConfig(rank=4), base="tiny", seed=0, lean=True)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        objective = PairObjective("dpo", SETTINGS["dpo"], objective_of(model))
        for batch in sequential_microbatches(pair_table(), micro_batch_tokens=60, layout=layout):
            (objective.loss_sum(batch)[0] / len(SHAPES)).backward()
        found.append(gradients(model))
        model.zero_grad()
    model.set_attn_implementation("eager")
    expected, _ = plain_step(saved, pair_table(), "dpo", SETTINGS["dpo"])
    expected.backward()
    for grads in found:
        assert distance(grads, gradients(model)) <= 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_an_idle_pass_gives_zeros_that_can_be_differentiated(folders: dict[str, Path], name: str) -> None:
    model = our_model(folders["llama"]).requires_grad_(True)
    objective = PairObjective(name, PreferenceConfig(), objective_of(model))
    idle = idle_microbatch(index=3)
    sums = objective.loss_sum(idle)
    sums[0].backward()
    assert sums.tolist() == [0.0] * 5 and objective.units(idle) == (0,) * 5
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_loss_of_pairs_that_are_far_apart_is_finite(folders: dict[str, Path]) -> None:
    model = our_model(folders["llama"])
    table = pair_table()
    table.known[:] = np.tile(np.float32([-5000.0, 5000.0]), len(table) // 2)
    (batch,) = sequential_microbatches(table, micro_batch_tokens=10_000, layout=SHARED)
    for name in LOSSES:
        assert torch.isfinite(PairObjective(name, PreferenceConfig(), objective_of(model)).loss_sum(batch)).all()
