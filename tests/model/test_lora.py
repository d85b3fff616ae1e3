"""The lean LoRA layer equals PEFT's layer, and PEFT's forward is used if the adapter is not plain."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from tests.support.families import family_model
from tests.support.models import examples_of, microbatch_of, objective_of, our_model, save_tiny
from torch import Tensor, nn

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError
from llamahome.model.lora import add_lora
from llamahome.model.lora_layers import LeanLoraLinear, use_own_forward
from llamahome.model.place import trained_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


def adapted(folder: Path, *, seed: int = 1, lean: bool = True, **changes) -> PeftModel:
    return add_lora(our_model(folder), LoraConfig(**{"rank": 4, "alpha": 6, **changes}), base="tiny", seed=seed, lean=lean)


def layers(model: nn.Module) -> list[PeftLinear]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


def weights_up(model: nn.Module, *, seed: int = 3) -> None:
    """Give the B matrices random values, because at zero half of the gradients vanish."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)


class Matrix(nn.Module):
    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.matrix = nn.Linear(12, 20, bias=biased)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(x)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 1, 12)], ids=str)
def test_forward_and_gradients_equal_pefts_layer(biased: bool, rslora: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = get_peft_model(Matrix(biased), PeftLoraConfig(r=4, lora_alpha=6, target_modules=["matrix"], use_rslora=rslora))
    weights_up(theirs)
    ours = copy.deepcopy(theirs)
    assert use_own_forward(ours) == 1 and type(layers(ours)[0]) is LeanLoraLinear and type(layers(theirs)[0]) is PeftLinear
    values = []
    for model in (ours, theirs):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        layer = layers(model)[0]
        values.append([out.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
        assert all(parameter.grad is None for parameter in layer.base_layer.parameters())
    for actual, expected in zip(*values, strict=True):
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": "v_proj"}, {"use_dora": True}],
    ids=str,
)
def test_loss_and_gradients_of_a_model_equal_pefts_forward(folder: Path, changes: dict) -> None:
    batch, results = microbatch_of(examples_of([20, 11, 3])), []
    for lean in (True, False):
        model = adapted(folder, lean=lean, **changes)
        weights_up(model)
        assert {type(layer) for layer in layers(model)} == {LeanLoraLinear if lean else PeftLinear}
        loss = objective_of(model.get_base_model()).loss_sum(batch)
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in trained_parameters(model).items()}))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_gradients.keys() == their_gradients.keys()
    for name, expected in their_gradients.items():
        # Two layers of 1e-6 each, and what they do to each other.
        assert (our_gradients[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_in_bfloat16_it_is_as_close_to_float32_as_pefts_layer(folder: Path) -> None:
    """The frozen weight and the input are bfloat16 in both; ours also rounds A and B to bfloat16."""
    torch.manual_seed(0)
    exact = get_peft_model(Matrix(True), PeftLoraConfig(r=4, lora_alpha=6, target_modules=["matrix"]))
    weights_up(exact)
    x = torch.randn(50, 12)
    low = copy.deepcopy(exact)
    layers(low)[0].base_layer.to(torch.bfloat16)
    use_own_forward(low)
    out = low(x.bfloat16())
    assert out.dtype == torch.bfloat16
    expected = exact(x)
    assert (out.float() - expected).norm() < 4 * 2**-9 * expected.norm()
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(trained_parameters(low).values(), trained_parameters(exact).values(), strict=True):
        assert ours.grad.dtype == torch.float32 and (ours.grad - theirs.grad).norm() < 8 * 2**-9 * theirs.grad.norm()


def test_dropout_uses_pefts_forward(folder: Path) -> None:
    model = adapted(folder, dropout=0.2)
    assert {type(layer) for layer in layers(model)} == {PeftLinear}


def test_layers_that_are_not_plain_keep_their_class() -> None:
    """Our forward would ignore the dropout or the bias of such an adapter."""
    for changes in ({"lora_dropout": 0.1}, {"lora_bias": True}, {"use_dora": True, "lora_dropout": 0.1}):
        torch.manual_seed(0)
        model = get_peft_model(Matrix(True), PeftLoraConfig(r=4, lora_alpha=6, target_modules=["matrix"], **changes))
        assert use_own_forward(model) == 0, changes


def test_a_disabled_or_merged_adapter_uses_pefts_forward(folder: Path) -> None:
    model = adapted(folder)
    weights_up(model)
    tokens = torch.arange(4, 14)[None]
    with torch.no_grad():
        on = _logits(model, tokens)
        with model.disable_adapter():
            off = _logits(model, tokens)
        model.merge_adapter()
        merged = _logits(model, tokens)
        model.unmerge_adapter()
        again = _logits(model, tokens)
    plain = our_model(folder)
    plain.set_attn_implementation("eager")
    torch.testing.assert_close(off, plain(input_ids=tokens).logits)
    assert (on - off).norm() > 0.01 * off.norm()
    torch.testing.assert_close(merged, on, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, on, rtol=1e-4, atol=1e-4)


def _logits(model: PeftModel, tokens: Tensor) -> Tensor:
    model.get_base_model().set_attn_implementation("eager")
    return model(input_ids=tokens).logits


def test_initial_weights_depend_only_on_the_seed(folder: Path) -> None:
    torch.manual_seed(11)
    first = adapted(folder, seed=5)
    torch.manual_seed(12)
    torch.rand(3)
    before = torch.random.get_rng_state()
    second, other = adapted(folder, seed=5), adapted(folder, seed=6)
    assert torch.equal(torch.random.get_rng_state(), before), "the generator of the process was moved"
    for name, parameter in trained_parameters(first).items():
        assert torch.equal(parameter, trained_parameters(second)[name])
        assert "lora_B" in name or not torch.equal(parameter, trained_parameters(other)[name])


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"use_dora": True}], ids=str)
def test_only_adapters_are_trained_in_float32_and_they_do_not_change_the_model_at_first(folder: Path, changes: dict) -> None:
    plain = our_model(folder)
    frozen = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    model = add_lora(our_model(folder, dtype=torch.bfloat16), LoraConfig(rank=4, **changes), base="tiny", seed=0, lean=True)
    assert {parameter.dtype for parameter in trained_parameters(model).values()} == {torch.float32}
    assert all("lora_" in name for name in trained_parameters(model))
    model = adapted(folder, **changes).eval()
    batch = microbatch_of(examples_of([20, 11]))
    loss = objective_of(model.get_base_model()).loss_sum(batch)
    torch.testing.assert_close(loss, objective_of(plain).loss_sum(batch), rtol=1e-6, atol=0)
    loss.backward()
    trained = set(trained_parameters(model))
    for name, parameter in model.named_parameters():
        assert name in trained or parameter.grad is None, name
        plain_name = name.removeprefix("base_model.model.").replace("base_layer.", "")
        assert name in trained or torch.equal(parameter, frozen[plain_name])


def test_all_linear_selects_every_matrix_except_the_head(folder: Path) -> None:
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained_parameters(adapted(folder))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_error_for_an_unknown_name_lists_the_existing_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match="called query, keys; there are") as error:
        adapted(folder, target_modules=["query", "q_proj", "keys"])
    (problem,) = error.value.problems
    assert problem.code == "lora.no-such-module" and "q_proj" in problem.hint and "lm_head" not in problem.hint


def test_conv1d_layers_can_be_named_too(tmp_path: Path) -> None:
    model = add_lora(our_model(save_tiny(tmp_path, "gpt2")), LoraConfig(target_modules=["c_attn"]), base="tiny", seed=0, lean=True)
    assert len(trained_parameters(model)) == 4


def test_a_layer_whose_adapter_peft_could_not_load_gets_none_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = add_lora(family_model("inkling2_text"), LoraConfig(rank=2), base="tiny", seed=0, lean=True)
    assert not [name for name, _ in model.named_parameters() if "weight_proj.lora_" in name]
    assert [name for name, _ in model.named_parameters() if "q_proj.lora_" in name]
    assert "PEFT cannot load an adapter of weight_proj in Inkling2ForCausalLM" in caplog.text
    with pytest.raises(ConfigError, match="cannot load an adapter of weight_proj"):
        add_lora(family_model("inkling2_text"), LoraConfig(target_modules=["weight_proj"]), base="tiny", seed=0, lean=True)
