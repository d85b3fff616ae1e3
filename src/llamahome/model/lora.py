"""LoRA through PEFT, with a forward and backward of our own for the plain case (no dropout, no DoRA, one adapter).

PEFT makes the modules, their initial values and their names, so what is saved is a PEFT adapter. For the plain case the layer's class is
replaced by one whose forward needs no input cast to float32 and no separate passes for scaling and adding; the frozen weight is
never given a gradient and the layer's input is kept once for both paths. Its forward and gradients equal PEFT's own, see
tests/model/test_lora.py.
Source: LoRA, arXiv 2106.09685.

Legend: T tokens, I inputs, O outputs, R rank.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError, Problem

ADAPTER = "default"
"""PEFT's own name for the only adapter; it does not appear in saved files."""


def add_lora(model: PreTrainedModel, config: LoraConfig, *, base: str, seed: int, lean: bool) -> PeftModel:
    """Freeze `model`, add float32 adapters to its linear layers, and return the PEFT model around it.

    `base` is what the saved adapter names as its base model. The first values come from `seed` alone. `lean` uses our forward
    where it applies (products in the stored type, no autocast). Raises ConfigError when no layer carries one of the wanted names.
    """
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted != "all-linear":
        wanted = [wanted]
    missing = [] if wanted == "all-linear" else [name for name in wanted if not any(_ends_with(path, name) for path in _linears(model))]
    if missing:
        names = sorted({path.rsplit(".", 1)[-1] for path in _linears(model)})
        raise ConfigError(
            Problem(
                code="lora.no-such-module",
                message=f"no linear layer below the output head is called {', '.join(missing)}; there are {', '.join(names)}",
                where="lora.target_modules",
                hint=f"--set lora.target_modules=[{', '.join(names)}]",
            )
        )
    settings = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # PEFT divides it, so a fraction works
        lora_dropout=config.dropout,
        target_modules=wanted,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=any(_is_conv1d(module) for module in model.modules()),
    )
    model.name_or_path = base  # PEFT writes it into the adapter's config
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    if lean:
        use_own_forward(adapted)
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide one warning that PEFT 0.21 causes and its user cannot act on: it asks transformers for a property under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def use_own_forward(model: nn.Module) -> int:
    """Give every plain LoRA layer on a floating-point matrix our forward; returns how many."""
    plain = [module for module in model.modules() if _is_plain(module)]
    for module in plain:
        module.__class__ = LeanLoraLinear
    return len(plain)


def _is_plain(module: Any) -> bool:
    """One adapter of two matrices on a Linear: no DoRA or other variant, no bias of its own, no dropout."""
    if type(module) is not PeftLinear or type(module.base_layer) is not nn.Linear or list(module.lora_A) != [ADAPTER]:
        return False
    drops = any(not isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
    return not (module.lora_variant or any(module.lora_bias.values()) or drops)


class _LeanLora(torch.autograd.Function):
    """y = x W' + b + (x A') B' * scale, all products in the type of x."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        a, b = a_RI.to(x_TI.dtype), (b_OR * scale).to(x_TI.dtype)
        low_TR = x_TI @ a.t()
        out = F.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b.t())
        ctx.save_for_backward(x_TI, weight_OI, low_TR, a, b)  # cast once for both directions
        ctx.scale, ctx.types = scale, (a_RI.dtype, b_OR.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO = gradients[0]
        x_TI, weight_OI, low_TR, a, b = ctx.saved_tensors
        grad_low_TR = grad_TO @ b
        grad_x = (grad_TO @ weight_OI).addmm_(grad_low_TR, a) if ctx.needs_input_grad[0] else None
        grad_a = (grad_low_TR.t() @ x_TI).to(ctx.types[0])
        grad_b = (grad_TO.t() @ low_TR).to(ctx.types[1]).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


class LeanLoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer with the lean forward; anything but its plain use goes to PEFT's own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output: x [..., I] -> [..., O]."""
        foreign = args or kwargs or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
        factors = None if foreign else lean_factors(self)
        if factors is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.get_base_layer()
        x = x.to(base.weight.dtype)
        out: Tensor = _LeanLora.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, *factors)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], out.shape[-1])


def lean_factors(layer: LeanLoraLinear) -> tuple[Tensor, Tensor, float] | None:
    """A [R, I], B [O, R] and the scale; None while the adapter is switched off, merged or not the only active one."""
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
        return None
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


def _linears(model: PreTrainedModel) -> list[str]:
    """Paths of what an adapter can sit on."""
    head = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if (isinstance(module, nn.Linear) or _is_conv1d(module)) and module is not head]


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Linear, whose matrix lies the other way round."""
    return type(module).__name__ == "Conv1D"


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
