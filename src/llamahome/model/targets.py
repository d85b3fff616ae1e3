"""Select the weights that get adapters: from the names in `lora.target_modules` to layers and stacked parameters of a model.

Only layers of the decoder are selected, because training runs nothing else; modules for images or sound could learn nothing. A router
gets an adapter only if its name is given. Experts that are stacked in one parameter [experts, out, in] are adapted only if they are
named, because of the cost (docs/decisions/0016). Works on a model before and after PEFT has wrapped its layers.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from llamahome.errors import ConfigError, Problem
from llamahome.model.packing import decoder_of
from llamahome.model.router_names import is_gate, routes

ALL = "all-linear"
OTHER_MODALITIES = re.compile(r"(^|[._])(vision|visual|image|img|audio|speech|video)")
"""Matches paths of modules that read no text."""
_STACKED_FROM = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
"""Stacked parameters by the names of the former layers of single experts; PEFT accepts these names too."""
_TOP_K_KEYS = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
"""Attributes with the number of experts that a token is routed to."""
EXPERT_COUNT_KEYS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
"""Attributes with the number of experts of a layer."""
_MAMBA_TYPES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Model types whose fast path reads the weight of out_proj without calling the layer; PEFT refuses an adapter there."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, or a stack of matrices, that hidden states are multiplied with."""

    path: str
    """Path of the linear layer, or of the parameter if it is stacked or belongs to another module."""
    form: str
    """"linear", "router", "stacked" (experts in one parameter), "fixed" (PEFT has no adapter for it) or "head"."""
    weights: int
    share: float
    """Share of the weights that one token uses: 0.25 if it is routed to 2 of 8 experts."""
    adapted: int
    """Number of weights of its adapter; 0 if it has none."""


@dataclass(frozen=True)
class ChosenTargets:
    """Full paths of the selected layers and parameters, in the order of the model."""

    modules: list[str]
    parameters: list[str]


def choose(model: PreTrainedModel, targets: str | Sequence[str]) -> ChosenTargets:
    """Select the layers and parameters that `targets` names: all-linear, ends of paths, or one regular expression over whole paths.

    Raises ConfigError if a name selects nothing.
    """
    adaptable = {each.path: each for each in matrices(model) if each.form != "fixed" and each.form != "head"}
    names = [targets] if isinstance(targets, str) else list(targets)
    selected: set[str] = set()
    missing: list[str] = []
    for name in names:
        if name.lower() == ALL:
            paths = {path for path, each in adaptable.items() if each.form == "linear"}
        else:
            routers = _may_name_router(name)
            paths = {path for path, each in adaptable.items() if _names(name, path) and (routers or each.form != "router")}
            paths |= _stacked_from(name, names, adaptable)
            if not paths and isinstance(targets, str):
                paths = _matching(name, adaptable)
        selected |= paths
        missing += [] if paths else [name]
    if missing:
        raise ConfigError(_no_such_module(model, missing))
    layers = dict(model.named_modules())
    chosen = [path for path in adaptable if path in selected]
    linear = {path for path in chosen if path in layers and adaptable[path].form == "linear"}
    # PEFT wraps a router's weight, not the layer, because a router may return more than one tensor.
    parameters = [f"{path}.weight" if path in layers else path for path in chosen if path not in linear]
    return ChosenTargets([path for path in chosen if path in linear], parameters)


def copied_bytes(model: PreTrainedModel, targets: str | Sequence[str]) -> int:
    """Bytes of the stacked weights in `targets`: PEFT adds the adapter to a copy of each, and the backward pass needs the copies."""
    weights = dict(model.named_parameters())
    stacked = [weights[path] for path in choose(model, targets).parameters if weights[path].ndim == 3]
    return sum(weight.numel() * weight.element_size() for weight in stacked)


def shortest_suffixes(paths: Sequence[str], every: Sequence[str], *, least: int = 1) -> list[str]:
    """The shortest suffixes, of at least `least` parts, that select `paths` and no other path in `every`."""
    wanted, suffixes = set(paths), set()
    for path in paths:
        parts = path.split(".")
        for length in range(least, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if length == len(parts) or all(other in wanted for other in every if _ends_with(other, suffix)):
                suffixes.add(suffix)
                break
    return sorted(suffixes)


def matrices(model: PreTrainedModel) -> Iterator[Matrix]:
    """Every two- or three-dimensional weight in the decoder and the head, without embeddings, norms and convolutions."""
    adapters, blocks = _adapter_sizes(model), _expert_blocks(model)
    in_decoder = {id(module) for module in decoder_of(model).modules()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        path = name.replace(".base_layer", "")
        if ".lora_" in path or ".vera_" in path or "token_adapter" in path.split(".") or is_adapted(module):
            continue
        if module is head:
            yield Matrix(path, "head", head.weight.numel(), 1.0, adapters.get(path, 0))
        elif id(module) not in in_decoder or OTHER_MODALITIES.search(path) or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            continue
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # GPT-2's linear layer
            linear = _acts_linear(module) and not (path.endswith("out_proj") and model.config.model_type in _MAMBA_TYPES)
            form = "router" if _is_router(path, module, blocks) else "linear" if linear else "fixed"
            yield Matrix(path, form, module.weight.numel(), 1.0, adapters.get(path, 0) + adapters.get(f"{path}.weight", 0))
        else:
            yield from _direct_matrices(path, module, blocks, adapters)


def _direct_matrices(path: str, module: nn.Module, blocks: dict[str, "_ExpertBlock"], adapters: dict[str, int]) -> Iterator[Matrix]:
    """The matrices among the direct parameters of a module that is no linear layer."""
    for name, weight in module.named_parameters(recurse=False):
        full_name, shape = f"{path}.{name}", weight.shape
        if weight.ndim not in (2, 3) or min(shape[-2:]) < 2 or "bias" in name:
            continue
        block = next((block for prefix, block in blocks.items() if full_name.startswith(prefix)), None)
        if weight.ndim == 3:
            form = "stacked"
        else:
            form = "router" if block is not None and name == "weight" and ".experts." not in full_name else "fixed"
        experts = shape[0] if form == "stacked" else block.experts if block is not None and ".experts." in full_name else 1
        share = min(1.0, block.top_k / experts) if block is not None and block.top_k else 1.0
        yield Matrix(full_name, form, weight.numel(), share, adapters.get(full_name, 0))


@dataclass(frozen=True)
class _ExpertBlock:
    """A module that holds experts and their router."""

    experts: int
    top_k: int
    """Number of experts that a token is routed to; 0 if unknown."""


def _expert_blocks(model: PreTrainedModel) -> dict[str, _ExpertBlock]:
    """The expert blocks by the prefix of their paths, longest prefix first."""
    layers = {name: module for name, module in model.named_modules() if not name.endswith(".base_layer") and ".lora_" not in name}
    blocks: dict[str, _ExpertBlock] = {}
    for name, module in model.named_modules():
        path = name.replace(".base_layer", "")
        stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1]
        named = "experts" in path.split(".") and any(p.ndim == 2 for p in module.parameters(recurse=False))
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding) or not (stacks or named) or "." not in path:
            continue
        outer = path[: path.index(".experts.")] if named and ".experts." in path else path.rpartition(".")[0]
        owners = [layers[outer], *layers[outer].modules(), model.config.get_text_config()]
        experts = stacks[0].shape[0] if stacks else _first_count(owners, EXPERT_COUNT_KEYS) or 1
        blocks[f"{outer}."] = _ExpertBlock(int(experts), _first_count(owners, _TOP_K_KEYS) or 0)
    return dict(sorted(blocks.items(), key=lambda item: -len(item[0])))


def _first_count(owners: Sequence[object], names: Sequence[str]) -> int | None:
    """The first positive integer attribute with one of these names; of a list with one integer per layer, the largest."""
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _is_router(path: str, layer: nn.Module, blocks: dict[str, _ExpertBlock]) -> bool:
    """Whether a layer is in an expert block and routes tokens to its experts."""
    prefix = next((prefix for prefix in blocks if path.startswith(prefix)), None)
    return prefix is not None and routes(path.removeprefix(prefix), getattr(layer, "out_features", 0), blocks[prefix].experts)


@torch.no_grad()
def _acts_linear(layer: nn.Module) -> bool:
    """Whether a subclass of Linear with its own forward returns one tensor of `out_features` values, as a linear layer does."""
    if type(layer) is nn.Linear or not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    try:
        out = layer(torch.zeros(2, 3, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(out, torch.Tensor) and out.shape == (2, 3, layer.out_features)


def is_adapted(module: nn.Module) -> bool:
    """Whether `module` is a layer of PEFT with a LoRA or VeRA adapter."""
    return (hasattr(module, "lora_A") or hasattr(module, "vera_lambda_b")) and hasattr(module, "base_layer")


def _adapter_sizes(model: nn.Module) -> dict[str, int]:
    """Number of weights of each adapter, by the path of the adapted layer or parameter."""
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if is_adapted(module):
            path, parameter = name.replace(".base_layer", ""), getattr(module, "parameter_name", None)
            weights = (p for n, p in module.named_parameters() if n.startswith(("lora_", "vera_")))
            sizes[f"{path}.{parameter}" if parameter else path] += sum(p.numel() for p in weights)
    return dict(sizes)


def _names(name: str, path: str) -> bool:
    """Whether `name` selects `path`: it is a suffix of the path, or of the path of the module that owns the parameter."""
    return _ends_with(path, name) or _ends_with(path.rpartition(".")[0], name) or _ends_with(f"{path}.weight", name)


def _may_name_router(name: str) -> bool:
    """Whether `name` may select a router: `gate` and `router.layer` do; `down_proj` does not, although a router may contain one."""
    parts = name.split(".")
    return len(parts) > 1 or any(map(is_gate, parts))


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _stacked_from(name: str, names: Sequence[str], adaptable: dict[str, Matrix]) -> set[str]:
    """Stacked experts by the name of their former layers; if two layers were stacked into one parameter, both must be named."""
    last = name.rpartition(".")[2]
    stacked = _STACKED_FROM.get(last)
    pair = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}.get(last)
    if stacked is None or (pair is not None and name.removesuffix(last) + pair not in names):
        return set()
    if last.startswith("w") and any(_names(last, path) for path in adaptable):  # the experts are still layers of this name
        return set()
    suffix = name.removesuffix(last) + stacked
    return {path for path, each in adaptable.items() if each.form == "stacked" and _ends_with(path, suffix)}


def _matching(pattern: str, adaptable: dict[str, Matrix]) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        message = f"{pattern!r} is neither the name of a layer nor a valid regular expression: {error}"
        raise ConfigError(Problem(code="lora.no-such-module", message=message, where="lora.target_modules")) from error
    return {path for path in adaptable if compiled.fullmatch(path) or compiled.fullmatch(f"{path}.weight")}


def _no_such_module(model: PreTrainedModel, missing: Sequence[str]) -> Problem:
    """The problem that the names in `missing` select nothing, with the reasons and the names that exist."""
    every = list(matrices(model))
    usable = [each for each in every if each.form in ("linear", "router", "stacked")]
    linear = sorted({kind(each) for each in usable if each.form == "linear"})
    stacked = sorted({kind(each) for each in usable if each.form == "stacked"})
    reasons = [reason for name in missing if (reason := _reason(model, name, every))]
    kinds = ", ".join([*linear, *stacked, *sorted({kind(each) for each in usable if each.form == "router"})])
    message = f"no linear layer below the output head is called {', '.join(missing)}; there are {kinds}"
    names = linear or stacked
    return Problem(
        code="lora.no-such-module",
        message="; ".join([message, *reasons]),
        where="lora.target_modules",
        hint=f"--set 'lora.target_modules=[{', '.join(names)}]'" if names else None,
    )


def _reason(model: PreTrainedModel, name: str, every: Sequence[Matrix]) -> str | None:
    """What `name` refers to in the model, if it exists but cannot get an adapter."""
    last = name.rpartition(".")[2]
    stacked = _STACKED_FROM.get(last)
    if stacked is not None and any(each.form == "stacked" and _ends_with(each.path, stacked) for each in every):
        return f"{name} is a part of {stacked}, in which the experts are stacked"
    matrix = next((each for each in every if _names(name, each.path)), None)
    if matrix is not None:
        return f"{name} is the output head" if matrix.form == "head" else f"{name} has a form for which PEFT has no adapter"
    path, module = next(((path, module) for path, module in model.named_modules() if _ends_with(path, name)), ("", None))
    if isinstance(module, nn.Embedding):
        return f"{name} is an embedding"
    return f"{name} is only in {path.rpartition('.')[0]}, which reads no text" if OTHER_MODALITIES.search(path) else None


def kind(matrix: Matrix) -> str:
    """The name of a matrix within its layer: q_proj; experts.gate_up_proj; router.layer."""
    parts = [part for part in matrix.path.split(".") if not part.isdigit()]
    if matrix.form == "linear" or matrix.form == "head":
        return parts[-1]
    return ".".join(parts[-2:]).removesuffix(".weight") if parts[-1] != "weight" else ".".join(parts[-3:-1])
