"""Initial values of adapters that are computed from the weights of the base: PiSSA, OLoRA, LoftQ.

PiSSA and OLoRA begin with parts of a weight W, so that B A is not zero at the start. The base stays as it is: what is subtracted is
kept beside the adapter as a second, frozen one, and layers compute W + scale (B A - B0 A0), which is W - scale B0 A0 as the papers have
it, plus scale B A. Both are saved as one plain adapter of twice the rank, so whatever loads adapters loads this one.
Process 0 computes; the others receive its values, because two processors may round them differently.
Cost: one decomposition of each adapted matrix, in float32.
Source: PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775; LoftQ, arXiv 2310.08659, with one iteration.

Legend: I inputs, O outputs, R rank, K the smaller of I and O.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from llamahome.config.initial import FROM_WEIGHTS, SUBTRACTED
from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, Problem
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.lora_layers import ADAPTER, keep_start, start_of
from llamahome.model.packed_weight import PackedWeight
from llamahome.model.quantized_sizes import quantized_names
from llamahome.model.shard_load import whole_of

Factors = tuple[Tensor, Tensor]
"""A [R, I] and B [O, R]."""
_ITERATIONS = 4
"""Of the randomised decomposition."""


def principal(weight_OI: Tensor, rank: int, scale: float, *, exact: bool = True) -> Factors:
    """PiSSA: the `rank` greatest singular values of a float32 matrix, their roots in both factors, so that scale B A is their part of it.

    Without `exact` by randomised subspace iteration, which draws from torch's generator.
    """
    if exact:
        left_OK, values_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        left_OK, values_K, right_IK = torch.svd_lowrank(weight_OI, q=rank, niter=_ITERATIONS)
        right_KI = right_IK.t()
    roots_R = (values_K[:rank] / scale).sqrt()
    return roots_R[:, None] * right_KI[:rank], left_OK[:, :rank] * roots_R


def orthonormal(weight_OI: Tensor, rank: int) -> Factors:
    """OLoRA: the first `rank` columns of Q and rows of R of the QR decomposition, not divided by the scale."""
    q_OK, r_KI = torch.linalg.qr(weight_OI)
    return r_KI[:rank].contiguous(), q_OK[:, :rank].contiguous()


def start_adapters(adapted: PeftModel, config: LoraConfig, base: Path, *, seed: int, world: World, compute: bool = True) -> None:
    """Give new adapters the initial values that `config.init` computes from weights; nothing to do for other values. All ranks call it.

    `base` is the folder with the weights as they were before they were quantised. If not `compute`, there is only room for the values,
    which are restored from a checkpoint. Raises ConfigError lora.no-initial-values if a layer
    cannot begin so.
    """
    if config.init not in FROM_WEIGHTS:
        return
    layers = dict(_layers(adapted))
    for path, layer in layers.items():
        _require_fit(path, layer, config.init)
    originals = _originals(base) if config.init == "loftq" else {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for path, layer in layers.items():
            if config.init == "loftq" and not isinstance(layer.get_base_layer().weight, PackedWeight):  # so there is no error to begin with
                continue
            a_RI, b_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a_RI.zero_()
            weight = whole_of(layer.get_base_layer().weight) if compute else None
            if world.is_main and weight is not None:
                a, b = _values(layer, weight, config.init, originals.get(path))
                a_RI.copy_(a)
                b_OR.copy_(b)
            for factor in (a_RI.data, b_OR.data):
                world.sum_(factor)
            if config.init in SUBTRACTED:
                keep_start(layer, a_RI.clone(), -b_OR)
    if config.init in SUBTRACTED:
        _describe_saved(adapted.peft_config[ADAPTER])


def _values(layer: PeftLinear, weight: Any, init: str, original: Callable[[], Tensor] | None) -> Factors:
    rank, scale = layer.r[ADAPTER], layer.scaling[ADAPTER]
    if original is not None:
        kept = torch.empty(weight.packed.shape)
        weight.packed.fill(kept)
        return principal(original().float() - kept, rank, scale)
    weight_OI = (weight.t() if layer.fan_in_fan_out else weight).float()
    return orthonormal(weight_OI, rank) if init == "olora" else principal(weight_OI, rank, scale, exact=init == "pissa")


def _originals(base: Path) -> dict[str, Callable[[], Tensor]]:
    """Path of each quantised layer -> what reads its weight as it was."""
    store = WeightStore(base)
    return {path: partial(store.read, name) for name, path in quantized_names(store, base).items()}


def _layers(adapted: PeftModel) -> Iterator[tuple[str, Any]]:
    """The adapted layers by their paths in the base."""
    return ((path, module) for path, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer))


def _require_fit(path: str, layer: Any, init: str) -> None:
    message, hint = "", "--set lora.init=default"
    if not isinstance(layer, PeftLinear):
        message = f"{path} is no plain linear layer to PEFT, and lora.init {init} decomposes such layers only"
    elif init in SUBTRACTED and isinstance(layer.get_base_layer().weight, PackedWeight):
        message, hint = f"lora.init {init} decomposes weights in 16 or 32 bits, and {path} is quantised", "--set lora.init=loftq"
    elif (rank := layer.r[ADAPTER]) > (most := min(layer.in_features, layer.out_features)):
        message, hint = (
            f"lora.init {init} takes at most as many parts as a matrix has: {most} in {path}, and its rank is {rank}",
            (f"--set lora.rank={most}"),
        )
    if message:
        raise ConfigError(Problem(code="lora.no-initial-values", message=message, where="lora.init", hint=hint))


def _describe_saved(settings: Any) -> None:
    """Make PEFT's config that of the adapter that is saved: twice the rank, with the same scale."""
    wider = math.sqrt(2) if settings.use_rslora else 2
    settings.r, settings.lora_alpha = 2 * settings.r, wider * settings.lora_alpha
    settings.rank_pattern = {name: 2 * rank for name, rank in settings.rank_pattern.items()}
    settings.alpha_pattern = {name: wider * alpha for name, alpha in settings.alpha_pattern.items()}


def _starts(adapted: PeftModel, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Any, int]]:
    """The keys in `values` of factors with a start, each with the buffer of its start and the dimension of the rank."""
    for path, layer in adapted.named_modules():
        for side, start, dimension in zip("AB", start_of(layer) or (), (0, 1), strict=False):
            for key in (f"{path}.lora_{side}.weight", f"{path}.lora_{side}.{ADAPTER}.weight"):
                if key in values:
                    yield key, start, dimension


def with_starts(adapted: PeftModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values` of the trained weights, as they are saved: each factor with its start behind it."""
    saved = dict(values)
    for key, start, dimension in _starts(adapted, values):
        saved[key] = torch.cat([values[key], start.to(values[key].device)], dim=dimension)
    return saved


def split_starts(adapted: PeftModel, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `with_starts`: returns the trained weights, and copies the starts into the model."""
    values = dict(saved)
    for key, start, dimension in _starts(adapted, saved):
        values[key], begun = (each.contiguous() for each in saved[key].chunk(2, dim=dimension))
        start.copy_(begun)
    return values


def starts_of(model: nn.Module) -> dict[str, Tensor]:
    """The factors that the adapters of `model` began with, where their product was not zero."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith((".start_A", ".start_B"))}
