"""LoRA through PEFT, with a forward and backward of our own for the plain case (no dropout, no DoRA, one adapter).

PEFT is handed exact names (model/targets.py): what it makes of `all-linear` takes routers and leaves shared experts out, by architecture.

PEFT makes the modules, their initial values and their names, so what is saved is a PEFT adapter. For the plain case the layer's class is
replaced by one whose forward needs no input cast to float32 and no separate passes for scaling and adding; the frozen weight is
never given a gradient and the layer's input is kept once for both paths. Its forward and gradients equal PEFT's own, see
tests/model/test_lora.py.
Source: LoRA, arXiv 2106.09685.

Legend: T tokens, I inputs, O outputs, R rank.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as keys_as_loaded
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError, Problem
from llamahome.model.targets import Chosen, choose, shortened
from llamahome.model.vocabulary import in_float32, trained_tokens

ADAPTER = "default"
"""PEFT's own name for the only adapter; it does not appear in saved files."""


def add_lora(model: PreTrainedModel, config: LoraConfig, *, base: str, seed: int, lean: bool, new_rows: Sequence[int] = ()) -> PeftModel:
    """Freeze `model`, add float32 adapters to what `config.target_modules` names, and return the PEFT model around it.

    `base` is what the saved adapter names as its base model. The first values come from `seed` alone. `lean` uses our forward where it
    applies (products in the stored type, no autocast). `new_rows` of embedding and head are trained, too. Raises ConfigError when
    nothing carries one of the wanted names, when PEFT cannot adapt with dropout or DoRA what does, or when PEFT would load none of it.
    """
    chosen = _loadable(model, choose(model, config.target_modules))
    modules, parameters = _spelled(model, chosen, config)
    settings = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # PEFT divides it, so a fraction works
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        trainable_token_indices=trained_tokens(model, new_rows),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's matrix lies the other way round,
    )
    model.name_or_path = base  # PEFT writes it into the adapter's config
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    in_float32(adapted)
    if lean:
        use_own_forward(adapted)
    return adapted


def _loadable(model: PreTrainedModel, chosen: Chosen) -> Chosen:
    """`chosen` without the layers whose adapter would be at its first values wherever PEFT loads it, which PEFT does not tell; we do.

    While PEFT loads an adapter it renames the keys as transformers renames those of the family's weights. Where `x.weight_proj` becomes
    `x.weight_proj.weight`, the key `x.weight_proj.lora_A.weight` becomes one that nothing has (Inkling2 in transformers 5.23).
    """
    saved = {f"base_model.model.{path}.lora_{side}.weight": torch.empty((1, 1), device="meta") for path in chosen.modules for side in "AB"}
    loaded = keys_as_loaded(model, PeftLoraConfig(target_modules=chosen.modules), saved)
    lost = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in saved.keys() - loaded.keys()}
    if not lost:
        return chosen
    kinds = ", ".join(sorted({path.rpartition(".")[2] for path in lost}))
    message = f"PEFT cannot load an adapter of {kinds} in {type(model).__name__}: transformers renames it on the way"
    kept = Chosen([path for path in chosen.modules if path not in lost], chosen.parameters)
    if not kept.modules and not kept.parameters:
        hint = "--set lora.target_modules=all-linear"
        raise ConfigError(Problem(code="lora.not-loadable", message=message, where="lora.target_modules", hint=hint))
    logging.getLogger(__name__).warning("%s; %d layers get none", message, len(lost))
    return kept


def _spelled(model: PreTrainedModel, chosen: Chosen, config: LoraConfig) -> tuple[list[str], list[str]]:
    """What is chosen, in names for PEFT's target_modules and target_parameters that mean nothing else here and wherever it is loaded."""
    every = [path for path, _ in model.named_modules()]
    modules = shortened(chosen.modules, every)
    renamed = {name for name in modules if _is_renamed(model, name)}
    modules = [name for name in modules if name not in renamed]
    as_weights = [f"{path}.weight" for path in chosen.modules if any(path == name or path.endswith("." + name) for name in renamed)]
    weights = [path for path, _ in model.named_parameters()]
    parameters = shortened([*chosen.parameters, *as_weights], weights, least=2)
    if parameters and (config.dropout or config.use_dora):
        raise ConfigError(_not_plain(model, parameters, config))
    return modules, parameters


def _is_renamed(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT takes a name for that of single experts of an older transformers, and would adapt stacked ones in its place.

    It does so when an adapter is made and again when one is loaded. The weight of the layer, named as a parameter, is left as it is.
    """
    settings = PeftLoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(settings, model=model, conversions=None)
    except ValueError:  # one of two names that belong together
        return True
    return set(settings.target_modules) != {name}


def _not_plain(model: PreTrainedModel, parameters: Sequence[str], config: LoraConfig) -> Problem:
    what, setting = ("dropout", "lora.dropout=0") if config.dropout else ("DoRA", "lora.use_dora=false")
    names = ", ".join(name.removesuffix(".weight") for name in parameters)
    message = f"in {type(model).__name__} PEFT adapts {names} as parameters, where {what} does not work"
    hint = "--set lora.dropout=0 --set lora.use_dora=false" if config.dropout and config.use_dora else f"--set {setting}"
    return Problem(code="lora.not-plain", message=message, where=f"lora.{'dropout' if config.dropout else 'use_dora'}", hint=hint)


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
        module.__class__ = LeanLoraLinear if type(module) is PeftLinear else LeanLoraWeight
    return len(plain)


def _is_plain(module: Any) -> bool:
    """One adapter of two matrices on a Linear: no DoRA or other variant, no bias of its own, no dropout."""
    if type(module) not in (PeftLinear, ParamWrapper) or type(module.base_layer) is not nn.Linear or list(module.lora_A) != [ADAPTER]:
        return False
    if type(module) is ParamWrapper and module.parameter_name != "weight":
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
        factors = _factors(self, x, args, kwargs)
        return _lean(self, x, factors) if factors is not None else super().forward(x, *args, **kwargs)


class LeanLoraWeight(ParamWrapper):  # type: ignore[misc]
    """The same for a Linear whose weight PEFT adapts as a parameter; its own forward adds B A to the whole weight in every pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output: x [..., I] -> [..., O]."""
        factors = _factors(self, x, args, kwargs)
        return _lean(self, x, factors) if factors is not None else super().forward(x, *args, **kwargs)


LEAN = (LeanLoraLinear, LeanLoraWeight)
"""Layers with the lean forward."""


def _factors(layer: Any, x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, float] | None:
    foreign = args or kwargs or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
    return None if foreign else lean_factors(layer)


def _lean(layer: Any, x: Tensor, factors: tuple[Tensor, Tensor, float]) -> Tensor:
    base = layer.get_base_layer()
    x = x.to(base.weight.dtype)
    out: Tensor = _LeanLora.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, *factors)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], out.shape[-1])


def lean_factors(layer: LeanLoraLinear | LeanLoraWeight) -> tuple[Tensor, Tensor, float] | None:
    """A [R, I], B [O, R] and the scale; None while the adapter is switched off, merged or not the only active one."""
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
        return None
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
