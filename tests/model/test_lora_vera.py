"""VeRA equals PEFT's in loss and gradients, by our forward, merged into one product and beside packed weights; what it excludes is said."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from peft.tuners.vera.layer import Linear as PeftVeraLinear
from safetensors.torch import load_file
from tests.support.models import examples_of, microbatch_of, objective_of, our_model, save_tiny
from torch import Tensor, nn

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError
from llamahome.model.adapter import save_model
from llamahome.model.adapter_folder import find_base
from llamahome.model.lora import add_lora, load_lora, quiet_peft
from llamahome.model.lora_layers import LeanVeraLinear, use_own_forward
from llamahome.model.lora_vera import factor_bytes, projection_numbers, projections_of, shared_products
from llamahome.model.packed_weight import PackedWeight
from llamahome.model.place import trained_parameters
from llamahome.model.rounding import to_nf4

FORMS = {
    "all layers": {},
    "some kinds": {"target_modules": ["q_proj", "down_proj"]},
    "some layers": {"layers": [1]},
    "a norm beside them": {"modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


def moved(model: nn.Module) -> nn.Module:
    """With vectors of random values: at the start one of them is zero and the gradient of the other vanishes."""
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=random)
    return model


def adapted(base: Path, *, lean: bool = True, seed: int = 0, **changes) -> PeftModel:
    config = LoraConfig(**{"rank": 24, "use_vera": True, **changes})
    return moved(add_lora(our_model(base), config, base=str(base), seed=seed, lean=lean))


def loss_and_gradients(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    loss = objective_of(model.get_base_model()).loss_sum(microbatch_of(examples_of([20, 11, 3])))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trained_parameters(model).items()}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 0
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() and gradient.norm() > 0, name


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_equal_pefts(base: Path, form: str) -> None:
    ours, theirs = (adapted(base, lean=lean, **FORMS[form]) for lean in (True, False))
    kinds = [{type(layer) for layer in model.modules() if isinstance(layer, PeftVeraLinear)} for model in (ours, theirs)]
    assert kinds == [{LeanVeraLinear}, {PeftVeraLinear}]
    assert_same(loss_and_gradients(ours), loss_and_gradients(theirs))


def test_layers_share_two_matrices_that_only_the_seed_decides_and_learn_vectors(base: Path) -> None:
    one, again, other = (adapted(base, seed=seed) for seed in (0, 0, 1))
    matrices = projections_of(one)
    assert {name: tuple(each.shape) for name, each in matrices.items()} == {
        "base_model.vera_A.default": (24, 48),  # the widest input of a layer, and the widest output
        "base_model.vera_B.default": (48, 24),
    }
    assert all(torch.equal(each, projections_of(again)[name]) for name, each in matrices.items())
    assert not any(torch.equal(each, projections_of(other)[name]) for name, each in matrices.items())
    assert {parameter.ndim for parameter in trained_parameters(one).values()} == {1}
    layers = [module for module in one.modules() if isinstance(module, LeanVeraLinear)]
    assert shared_products(one) == 24 * sum(layer.in_features + layer.out_features for layer in layers) and len(layers) == 14


def test_a_new_adapter_changes_nothing(base: Path) -> None:
    batch = microbatch_of(examples_of([20, 11, 3]))
    model = add_lora(our_model(base), LoraConfig(rank=24, use_vera=True), base="tiny", seed=0, lean=True)
    torch.testing.assert_close(objective_of(model.get_base_model()).loss_sum(batch), objective_of(our_model(base)).loss_sum(batch))


def test_packed_rows_learn_as_alone(base: Path) -> None:
    lengths, model = [20, 11, 3], adapted(base)
    together = loss_and_gradients(model)
    model.zero_grad()
    objective = objective_of(model.get_base_model())
    losses = [objective.loss_sum(microbatch_of([example])) for example in examples_of(lengths)]
    sum(losses).backward()
    alone = torch.stack(losses).sum().detach(), {name: each.grad for name, each in trained_parameters(model).items()}
    torch.testing.assert_close(together[0], alone[0], rtol=1e-6, atol=0)
    for name, gradient in alone[1].items():
        assert (together[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_dropout_uses_pefts_forward_and_without_it_no_input_is_kept(base: Path) -> None:
    assert {type(m) for m in adapted(base, dropout=0.3).modules() if isinstance(m, PeftVeraLinear)} == {PeftVeraLinear}
    layer = next(module for module in adapted(base).modules() if isinstance(module, LeanVeraLinear))
    x, kept = torch.randn(50, layer.in_features, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.shape) or each, lambda each: each):
        layer(x)
    assert torch.Size([50, 24]) in kept and x.shape not in kept


class Matrices(nn.Module):
    """Two layers after each other, the second with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 48, bias=False), nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(15, 64), (2, 5, 64)], ids=str)
def test_a_layer_and_one_with_a_packed_weight_equal_pefts(packed: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    theirs = moved(get_peft_model(Matrices(), VeraConfig(r=20, target_modules=["first", "second"])))
    ours = copy.deepcopy(theirs)
    assert use_own_forward(ours) == 2
    if packed:
        for model, other in zip(theirs.modules(), list(ours.modules()), strict=True):
            if isinstance(model, PeftVeraLinear):
                weight = to_nf4(model.base_layer.weight.data)
                weight.fill(model.base_layer.weight.data)
                other.base_layer.weight = nn.Parameter(PackedWeight(weight, torch.float32), requires_grad=False)
    results = []
    for model in (ours, theirs):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(parameter.grad for parameter in trained_parameters(model).values())])
    assert len(results[0]) == 6
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_in_bfloat16_it_is_as_near_to_float32_as_rounding_allows() -> None:
    torch.manual_seed(3)
    exact = moved(get_peft_model(Matrices(), VeraConfig(r=20, target_modules=["first", "second"])))
    low = copy.deepcopy(exact)
    for layer in [module for module in low.modules() if isinstance(module, PeftVeraLinear)]:
        layer.base_layer.to(torch.bfloat16)
    use_own_forward(low)
    x = torch.randn(40, 64)
    out, expected = low(x.bfloat16()), exact(x)
    for each in (out, expected):
        each.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and (out.float() - expected).norm() < 0.04 * expected.norm()
    for ours, theirs in zip(trained_parameters(low).values(), trained_parameters(exact).values(), strict=True):
        assert ours.grad.dtype == torch.float32 and (ours.grad - theirs.grad).norm() < 0.04 * theirs.grad.norm()


def test_what_is_saved_is_pefts_and_continues_with_its_own_matrices(base: Path, tmp_path: Path) -> None:
    model = adapted(base, seed=5)
    save_model(model, tmp_path / "saved", base=base)
    assert {"base_model.vera_A", "base_model.vera_B"} < load_file(tmp_path / "saved/adapter_model.safetensors").keys()
    with quiet_peft():
        theirs = PeftModel.from_pretrained(our_model(base), tmp_path / "saved", is_trainable=True)
    ours = load_lora(our_model(base), tmp_path / "saved", base="tiny", dropout=0.0, lean=True)
    expected = loss_and_gradients(model)
    assert_same(loss_and_gradients(ours), expected)
    assert_same(loss_and_gradients(theirs), expected)


def test_a_moved_base_is_found_by_the_sizes_of_layers(base: Path, tmp_path: Path) -> None:
    save_model(adapted(base), tmp_path / "saved", base=base)
    path = tmp_path / "saved/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "gone/model")}))
    shutil.copytree(base, tmp_path / "moved")
    save_tiny(tmp_path / "narrow", "llama", hidden_size=16)
    with pytest.raises(ConfigError) as gone:
        find_base(tmp_path / "saved", say=lambda _: None)
    assert gone.value.problems[0].hint == f"--set model.name={tmp_path / 'moved'}"


def test_embeddings_and_stacked_experts_are_refused(base: Path, tmp_path: Path) -> None:
    for model, changes, key in (
        (our_model(base), {"modules_to_save": ["lm_head"]}, "lora.modules_to_save"),
        (our_model(save_tiny(tmp_path, "deepseek")), {"target_modules": ["experts.gate_up_proj"]}, "lora.use_vera"),
    ):
        with pytest.raises(ConfigError) as refused:
            add_lora(model, LoraConfig(rank=4, use_vera=True, **changes), base="tiny", seed=0, lean=True)
        (problem,) = refused.value.problems
        assert (problem.code, problem.where) == ("lora.not-vera", key) and "--set" in str(problem.hint)


def test_the_plan_counts_what_is_there(base: Path) -> None:
    model, config = adapted(base), LoraConfig(rank=24, use_vera=True)
    assert projection_numbers(our_model(base), config) == sum(each.numel() for each in projections_of(model).values())
    kept = factor_bytes(our_model(base), config, torch.float32)
    assert kept.fixed == 4 * shared_products(model) and kept.per_token == 4 * 24 * 14
    assert kept.of(10, recomputes=True) == kept.of(10, recomputes=False) // 2  # of two layers one is computed again
    assert factor_bytes(our_model(base), LoraConfig(), torch.float32).of(10, recomputes=False) == 0
