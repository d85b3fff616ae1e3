"""VeRA equals PEFT's in loss and gradients, by our forward, merged into one product and beside packed weights; what it excludes is said."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.vera.layer import Linear as PeftVeraLinear
from tests.support.models import examples_of, microbatch_of, objective_of, our_model, save_tiny
from torch import Tensor, nn

from llamahome.config.schema import LoraConfig
from llamahome.model.lora import add_lora
from llamahome.model.lora_layers import LeanVeraLinear
from llamahome.model.place import trained_parameters

FORMS = {
    "all layers": {},
    "some kinds": {"target_modules": ["q_proj", "down_proj"]},
    "some layers": {"layers": [1]},
    "a bare head": {"modules_to_save": ["norm"]},
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
