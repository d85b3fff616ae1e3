"""DoRA's own forward: equal to PEFT's in values and gradients, alone, merged into one product, and beside packed weights."""

import copy

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from llamahome.model.lora_layers import LeanLoraLinear, output_gain, use_own_forward
from llamahome.model.packed_weight import PackedWeight
from llamahome.model.rounding import to_nf4


class Matrices(nn.Module):
    """Two layers after each other, the second with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 48, bias=False), nn.Linear(48, 12)
        nn.init.normal_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def models(*, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same adapted model with PEFT's forward and with ours; no factor is zero and no magnitude is a length."""
    torch.manual_seed(3)
    theirs = get_peft_model(Matrices(), PeftLoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], use_dora=True))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            parameter.data.mul_(torch.rand(parameter.shape) + 0.5)
    for layer in _layers(theirs):
        layer.base_layer.to(dtype)
    ours = copy.deepcopy(theirs)
    assert use_own_forward(ours) == 2
    return theirs, ours


def _layers(model: nn.Module) -> list[PeftLinear]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _compare(theirs: nn.Module, ours: nn.Module, inputs: tuple[Tensor, Tensor], tolerance: float) -> None:
    outputs = [model(x) for model, x in zip((theirs, ours), inputs, strict=True)]
    torch.manual_seed(4)
    weights = torch.randn(outputs[0].shape)
    for output in outputs:
        (output.float() * weights).sum().backward()
    assert (outputs[0].float() - outputs[1].float()).norm() <= tolerance * outputs[0].float().norm()
    found = _trained(ours)
    assert len(found) == 6
    for name, parameter in _trained(theirs).items():
        assert (parameter.grad - found[name].grad).norm() <= tolerance * parameter.grad.norm(), name
    if inputs[0].grad is not None:
        assert (inputs[0].grad - inputs[1].grad).norm() <= tolerance * inputs[0].grad.norm()


def test_values_and_gradients_are_pefts() -> None:
    theirs, ours = models()
    x = torch.randn(2, 15, 64)
    _compare(theirs, ours, (x.clone().requires_grad_(), x.clone().requires_grad_()), 1e-5)


def test_in_bfloat16_they_are_as_near_to_the_exact_ones_as_rounding_allows() -> None:
    exact, _ = models()
    _, ours = models(dtype=torch.bfloat16)
    x = torch.randn(40, 64)
    _compare(exact, ours, (x, x.bfloat16()), 4e-2)


def test_a_large_bias_does_not_hide_the_gradient_of_the_magnitude_in_bfloat16() -> None:
    exact, _ = models()
    _, ours = models(dtype=torch.bfloat16)
    x = torch.randn(40, 48)
    for model, given in ((exact.double(), x.double()), (ours, x.bfloat16())):
        model.base_model.model.second.base_layer.bias.data.mul_(300)
        model.base_model.model.second(given).float().sum().backward()
    expected, found = (m.base_model.model.second.lora_magnitude_vector["default"].weight.grad for m in (exact, ours))
    assert (expected - found).norm() <= 2e-2 * expected.norm()


def test_a_packed_weight_counts_as_the_matrix_that_it_stands_for() -> None:
    theirs, ours = models()
    for one, other in zip(_layers(theirs), _layers(ours), strict=True):
        packed = to_nf4(one.base_layer.weight.data)
        packed.fill(one.base_layer.weight.data)
        other.base_layer.weight = nn.Parameter(PackedWeight(packed, torch.float32), requires_grad=False)
    x = torch.randn(15, 64)
    _compare(theirs, ours, (x, x), 1e-5)


def test_a_magnitude_of_zero_gives_no_output_and_has_its_gradient() -> None:
    theirs, ours = models()
    for model in (theirs, ours):
        model.base_model.model.first.lora_magnitude_vector["default"].weight.data[5] = 0.0
    x = torch.randn(15, 64)
    outputs = [model.base_model.model.first(x) for model in (theirs, ours)]
    for output in outputs:
        output.sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    grads = [model.base_model.model.first.lora_magnitude_vector["default"].weight.grad for model in (theirs, ours)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    assert grads[1][5].abs() > 0


def test_the_gain_is_one_at_the_start() -> None:
    torch.manual_seed(3)
    model = get_peft_model(Matrices(), PeftLoraConfig(r=4, lora_alpha=6, target_modules=["first"], use_dora=True))
    use_own_forward(model)
    (layer,) = _layers(model)
    assert isinstance(layer, LeanLoraLinear)
    torch.testing.assert_close(output_gain(layer), torch.ones(48), rtol=1e-6, atol=0)
