"""The layers of LoRA, DoRA and VeRA: our forward and backward for plain adapters (no dropout, one adapter), PEFT's for the others.

A plain layer gets a class whose forward does not cast the input to float32, scales and adds inside the matrix products, stores the input
once and computes no gradient for the frozen weight. With DoRA its outputs are then multiplied by a trained magnitude over the length of
their row of W + s B A. The length is taken from the factors, |w|^2 + 2 s w.(b A) + s^2 |b A|^2, so no matrix of the size of W is made.
A layer of VeRA is one of LoRA whose A is frozen: diag(b) B diag(d) A, of which B takes both trained vectors, so that layers with the same
input have the same A.
Results equal PEFT's (test_lora.py, test_dora.py, test_lora_vera.py in tests/model).
Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; VeRA, arXiv 2310.11454.

Legend: T tokens, I inputs, O outputs, R rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera.layer import Linear as PeftVeraLinear
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from llamahome.model.packed_weight import PackedWeight

ADAPTER = "default"
"""PEFT's name for the only adapter; saved files do not contain it."""
_LEAST_GAIN = 1e-6
"""Stands for smaller gains of DoRA, whose gradient is found by dividing by them."""


def use_own_forward(model: nn.Module) -> int:
    """Replace the forward of every plain LoRA or VeRA layer by ours; returns their number."""
    plain = [module for module in model.modules() if _is_plain(module)]
    for module in plain:
        module.__class__ = _LEAN_OF[type(module)]
    return len(plain)


def _is_plain(module: Any) -> bool:
    """Whether `module` is one adapter on a Linear, without variants but DoRA, without bias and without dropout."""
    if type(module) not in _LEAN_OF or type(module.base_layer) is not nn.Linear:
        return False
    if type(module) is PeftVeraLinear:
        return list(module.vera_lambda_d) == [ADAPTER] and isinstance(module.vera_dropout[ADAPTER], nn.Identity)
    if list(module.lora_A) != [ADAPTER]:
        return False
    if type(module) is ParamWrapper and module.parameter_name != "weight":
        return False
    drops = any(not isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
    others = any(type(variant) is not DoraLinearVariant for variant in module.lora_variant.values())
    return not (others or any(module.lora_bias.values()) or drops)


class _LeanLora(torch.autograd.Function):
    """y = x W' + b + (x A') B' * scale, with all products in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        a, b = a_RI.to(x_TI.dtype), (b_OR * scale).to(x_TI.dtype)
        low_TR = x_TI @ a.t()
        out = F.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b.t())
        kept = x_TI if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept, weight_OI, low_TR, a, b)  # a and b as cast, so that backward does not cast again
        ctx.scale, ctx.dtypes = scale, (a_RI.dtype, b_OR.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO = gradients[0]
        x_TI, weight_OI, low_TR, a, b = ctx.saved_tensors
        grad_low_TR = grad_TO @ b
        grad_x = (grad_TO @ weight_OI).addmm_(grad_low_TR, a) if ctx.needs_input_grad[0] else None
        grad_a = (grad_low_TR.t() @ x_TI).to(ctx.dtypes[0]) if ctx.needs_input_grad[3] else None
        grad_b = (grad_TO.t() @ low_TR).to(ctx.dtypes[1]).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


class _ScaledOutputs(torch.autograd.Function):
    """y = z gain + b, in the dtype of z.

    What is kept for the gradient of `gain` is y, which the next layer may keep anyway and must not change. With a bias, which may be so
    large that z is lost in y, it is z.
    """

    @staticmethod
    def forward(ctx: Any, z_TO: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
        scaled = z_TO * gain_O
        y_TO = (scaled if bias_O is None else scaled + bias_O).to(z_TO.dtype)
        ctx.save_for_backward(y_TO if bias_O is None else z_TO, gain_O)
        ctx.keeps_z = bias_O is not None
        return y_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO = gradients[0]
        kept_TO, gain_O = ctx.saved_tensors
        grad_gain_O = (grad_TO * kept_TO).sum(0, dtype=gain_O.dtype)
        return (grad_TO * gain_O).to(grad_TO.dtype), grad_gain_O if ctx.keeps_z else grad_gain_O / gain_O, None


def scale_outputs(z_TO: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """[T, O] of the products without a bias times what `output_gain` gives, plus the bias; differentiable with respect to both."""
    result: Tensor = _ScaledOutputs.apply(z_TO, gain_O, bias_O)  # type: ignore[no-untyped-call]
    return result


class StartedLoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer without the product that its adapter began with, so that the base keeps its own weight (lora_init.py)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output: x [..., I] -> [..., O]."""
        out: Tensor = super().forward(x, *args, **kwargs)
        if (start := start_of(self)) is None or not is_active(self):
            return out
        a_RI, b_OR = start
        scale: float = self.scaling[ADAPTER]
        return out + (F.linear(F.linear(x.to(a_RI.dtype), a_RI), b_OR) * scale).to(out.dtype)


class LeanLoraLinear(StartedLoraLinear):
    """PEFT's LoRA layer with the lean forward; uses PEFT's forward if the call or the adapter is not plain."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output: x [..., I] -> [..., O]."""
        factors = _factors(self, x, args, kwargs)
        return _lean(self, x, factors) if factors is not None else super().forward(x, *args, **kwargs)


class LeanLoraWeight(ParamWrapper):  # type: ignore[misc]
    """The same for a Linear whose weight PEFT adapts as a parameter; PEFT's forward would add B A to the whole weight in every pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output: x [..., I] -> [..., O]."""
        factors = _factors(self, x, args, kwargs)
        return _lean(self, x, factors) if factors is not None else super().forward(x, *args, **kwargs)


class LeanVeraLinear(PeftVeraLinear):  # type: ignore[misc]
    """PEFT's VeRA layer with the lean forward; uses PEFT's forward if the call or the adapter is not plain."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output: x [..., I] -> [..., O]."""
        factors = _factors(self, x, args, kwargs)
        return _lean(self, x, factors) if factors is not None else super().forward(x, *args, **kwargs)


LEAN = (LeanLoraLinear, LeanLoraWeight, LeanVeraLinear)
"""Layers with the lean forward."""
LeanLayer: TypeAlias = LeanLoraLinear | LeanLoraWeight | LeanVeraLinear
_LEAN_OF: dict[type, type[nn.Module]] = {PeftLinear: LeanLoraLinear, ParamWrapper: LeanLoraWeight, PeftVeraLinear: LeanVeraLinear}


def _factors(layer: Any, x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, float] | None:
    """What `lean_factors` returns; None if the call has further arguments or runs under autocast."""
    not_plain = args or kwargs or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
    return None if not_plain else lean_factors(layer)


def _lean(layer: Any, x: Tensor, factors: tuple[Tensor, Tensor, float]) -> Tensor:
    base, gain_O = layer.get_base_layer(), output_gain(layer)
    x = x.to(base.weight.dtype)
    bias_O = base.bias if gain_O is None else None
    out: Tensor = _LeanLora.apply(x.reshape(-1, x.shape[-1]), base.weight, bias_O, *factors)  # type: ignore[no-untyped-call]
    if gain_O is not None:
        out = scale_outputs(out, gain_O, base.bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def keep_start(layer: PeftLinear, a_RI: Tensor, negative_b_OR: Tensor) -> None:
    """Let `layer` add scale B A of these float32 factors to its output while its adapter is active."""
    if not isinstance(layer, StartedLoraLinear):
        layer.__class__ = StartedLoraLinear
    layer.register_buffer("start_A", a_RI, persistent=False)
    layer.register_buffer("start_B", negative_b_OR, persistent=False)


def start_of(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What `keep_start` was given; None if the product of the adapter was zero at its start."""
    a_RI, b_OR = (layer._buffers.get(name) for name in ("start_A", "start_B"))
    return None if a_RI is None or b_OR is None else (a_RI, b_OR)


def is_active(layer: Any) -> bool:
    """Whether the adapter is on, not merged and the only active one."""
    return not (layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER])


def lean_factors(layer: LeanLayer) -> tuple[Tensor, Tensor, float] | None:
    """A [R, I], B [O, R] and the scale, with the rows of the adapter's start, if it has one; None if the adapter is not active.

    A is frozen with VeRA, and of layers with as many inputs the same.
    """
    if not is_active(layer):
        return None
    if isinstance(layer, LeanVeraLinear):
        scales_OR = layer.vera_lambda_b[ADAPTER][:, None] * layer.vera_lambda_d[ADAPTER]
        return layer.vera_A[ADAPTER][:, : layer.in_features], layer.vera_B[ADAPTER][: layer.out_features] * scales_OR, 1.0
    a_RI, b_OR, scale = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
    if (start := start_of(layer)) is None:
        return a_RI, b_OR, scale
    return torch.cat([a_RI, start[0]]), torch.cat([b_OR, start[1]], dim=1), scale


def has_magnitude(layer: LeanLayer) -> bool:
    """Whether the adapter is one of DoRA."""
    return not isinstance(layer, LeanVeraLinear) and ADAPTER in layer.lora_variant


def output_gain(layer: LeanLayer) -> Tensor | None:
    """float32 [O]: what DoRA multiplies each output with, where the length of its row counts as constant; None without DoRA."""
    if not has_magnitude(layer):
        return None
    weight_OI, magnitude_O = layer.get_base_layer().weight, layer.lora_magnitude_vector[ADAPTER].weight.float()
    with torch.no_grad():
        a_RI, b_OR = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float() * layer.scaling[ADAPTER]
        wide_OI = (weight_OI.widened() if isinstance(weight_OI, PackedWeight) else weight_OI).float()
        cross_OR = (wide_OI @ a_RI.t()).mul_(2).addmm_(b_OR, a_RI @ a_RI.t())
        squares_O = torch.linalg.vector_norm(wide_OI, dim=1).square_() + (cross_OR * b_OR).sum(1)
    gain_O: Tensor = magnitude_O / squares_O.clamp_(min=0).sqrt_()
    return torch.where(gain_O.abs() < _LEAST_GAIN, gain_O - gain_O.detach() + _LEAST_GAIN, gain_O)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model in training compute as its base; its adapters are trained as before afterwards."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(enabled=False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        for parameter in trained:
            parameter.requires_grad_(True)
