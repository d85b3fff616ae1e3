"""Which weights get adapters: the names that a user wrote -> layers and stacked parameters of this very model, and the account of it.

Training runs the decoder alone, so only its layers are taken: an adapter outside, or in an image or audio part, could learn nothing.
A router decides which experts see a token; it gets an adapter only when its name is written. Experts that are stacked in one parameter
[experts, out, in] are no layers: they are adapted only when they are named, because of what that costs (docs/decisions/0016). Works on a
model before and after PEFT has wrapped its layers.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from llamahome.errors import ConfigError, Problem
from llamahome.model.decoder import decoder_of

ALL = "all-linear"
_GATES = re.compile(r"(.*_)?(gate|router)s?|wg")
"""Names of what weighs experts, beside them: mlp.gate, mlp.gate.wg, router.layer, shared_expert_gate."""
OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|image|img|audio|speech|video)")
"""In the path of a part that reads no text."""
_STACKED_FROM = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
"""What the layers of single experts were called before they were stacked; PEFT takes these names too."""
_TAKEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
COUNTED = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")

_MAMBAS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Types of models whose fast paths read out_proj past its layer; PEFT refuses an adapter there."""


@dataclass(frozen=True)
class Matrix:
    """A weight that tokens are multiplied with."""

    path: str
    """Of the layer, or of the parameter where it is stacked or belongs to no linear layer."""
    form: str
    """"linear", "router", "stacked" (experts in one parameter), "fixed" (a form that PEFT has no adapter for) or "head"."""
    weights: int
    share: float
    """Of these weights, those that one token passes: 0.25 where it goes to 2 of 8 experts."""
    adapted: int
    """Weights of its adapter, 0 without."""


@dataclass(frozen=True)
class Chosen:
    """Full paths, in the order of the model."""

    modules: list[str]
    parameters: list[str]


def choose(model: PreTrainedModel, wanted: str | Sequence[str]) -> Chosen:
    """What `wanted` names: all-linear, ends of names, or one regular expression over whole paths. ConfigError for a name of nothing."""
    found = {each.path: each for each in matrices(model) if each.form != "fixed" and each.form != "head"}
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    taken: set[str] = set()
    missing: list[str] = []
    for name in names:
        if name.lower() == ALL:
            hits = {path for path, each in found.items() if each.form == "linear"}
        else:
            meant = _means_router(name)
            hits = {path for path, each in found.items() if _names(name, path) and (meant or each.form != "router")}
            hits |= _before_stacking(name, names, found)
            if not hits and isinstance(wanted, str):
                hits = _matched(name, found)
        taken |= hits
        missing += [] if hits else [name]
    if missing:
        raise ConfigError(_no_such(model, missing, found.values()))
    layers = dict(model.named_modules())
    chosen = [path for path in found if path in taken]
    plain = {path for path in chosen if path in layers and found[path].form == "linear"}
    # A router may return more than a tensor, which PEFT's layer cannot wrap; a wrapped parameter leaves its layer as it is.
    others = [f"{path}.weight" if path in layers else path for path in chosen if path not in plain]
    return Chosen([path for path in chosen if path in plain], others)


def copied_bytes(model: PreTrainedModel, wanted: str | Sequence[str]) -> int:
    """Memory of the stacked weights among `wanted`: PEFT adds the adapter to a copy of each, which the backward pass needs again."""
    weights = dict(model.named_parameters())
    stacked = [weights[path] for path in choose(model, wanted).parameters if weights[path].ndim == 3]
    return sum(weight.numel() * weight.element_size() for weight in stacked)


def shortened(paths: Sequence[str], every: Sequence[str], *, least: int = 1) -> list[str]:
    """The shortest ends of at least `least` names that name `paths` and nothing else of `every`."""
    wanted, made = set(paths), set()
    for path in paths:
        parts = path.split(".")
        for length in range(least, len(parts) + 1):
            end = ".".join(parts[-length:])
            if length == len(parts) or all(other in wanted for other in every if _ends_with(other, end)):
                made.add(end)
                break
    return sorted(made)


def matrices(model: PreTrainedModel) -> Iterator[Matrix]:
    """Every weight of two or three sides that the decoder or the head multiplies tokens with; no embeddings, norms or convolutions."""
    adapters, homes = _adapters(model), _homes(model)
    reached = {id(module) for module in decoder_of(model).modules()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        path = name.replace(".base_layer", "")
        if ".lora_" in path or "token_adapter" in path.split(".") or _is_wrapper(module):
            continue
        if module is head:
            yield Matrix(path, "head", head.weight.numel(), 1.0, adapters.get(path, 0))
        elif id(module) not in reached or OTHER_SENSES.search(path) or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            continue
        elif isinstance(module, nn.Linear) or _is_conv1d(module):
            plain = _acts_linear(module) and not (path.endswith("out_proj") and model.config.model_type in _MAMBAS)
            form = "router" if _is_router(path, module, homes) else "linear" if plain else "fixed"
            yield Matrix(path, form, module.weight.numel(), 1.0, adapters.get(path, 0) + adapters.get(f"{path}.weight", 0))
        else:
            yield from _own(path, module, homes, adapters)


def _own(path: str, module: nn.Module, homes: dict[str, "_Home"], adapters: dict[str, int]) -> Iterator[Matrix]:
    """The matrices among the parameters that belong to a module itself."""
    for name, weight in module.named_parameters(recurse=False):
        place, shape = f"{path}.{name}", weight.shape
        if weight.ndim not in (2, 3) or min(shape[-2:]) < 2 or "bias" in name:
            continue
        home = next((home for start, home in homes.items() if place.startswith(start)), None)
        if weight.ndim == 3:
            form = "stacked"
        else:
            form = "router" if home is not None and name == "weight" and ".experts." not in place else "fixed"
        experts = shape[0] if form == "stacked" else home.experts if home is not None and ".experts." in place else 1
        share = min(1.0, home.taken / experts) if home is not None and home.taken else 1.0
        yield Matrix(place, form, weight.numel(), share, adapters.get(place, 0))


@dataclass(frozen=True)
class _Home:
    """What surrounds the experts of one layer: their number, and how many of them a token passes (0: not known)."""

    experts: int
    taken: int


def _homes(model: PreTrainedModel) -> dict[str, _Home]:
    """By the beginning of their paths, longest first: the modules that hold experts, their router beside them."""
    layers = {name: module for name, module in model.named_modules() if not name.endswith(".base_layer") and ".lora_" not in name}
    found: dict[str, _Home] = {}
    for name, module in model.named_modules():
        path = name.replace(".base_layer", "")
        stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1]
        named = "experts" in path.split(".") and any(p.ndim == 2 for p in module.parameters(recurse=False))
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding) or not (stacks or named) or "." not in path:
            continue
        outer = path[: path.index(".experts.")] if named and ".experts." in path else path.rpartition(".")[0]
        around = [layers[outer], *layers[outer].modules(), model.config.get_text_config()]
        experts = stacks[0].shape[0] if stacks else _number(around, COUNTED) or 1
        found[f"{outer}."] = _Home(int(experts), _number(around, _TAKEN) or 0)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _number(places: Sequence[object], names: Sequence[str]) -> int | None:
    """The first whole number under one of these names; a list of one per layer counts as its largest."""
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _is_router(path: str, layer: nn.Module, homes: dict[str, _Home]) -> bool:
    """A layer beside experts that is called a gate or gives one number per expert."""
    for start, home in homes.items():
        if path.startswith(start):
            inner = path.removeprefix(start).split(".")
            return any(_GATES.fullmatch(part) for part in inner) or getattr(layer, "out_features", 0) == home.experts
    return False


@torch.no_grad()
def _acts_linear(layer: nn.Module) -> bool:
    """Whether a layer with a forward of its own gives what a linear layer gives: one tensor, of as many numbers as it has rows."""
    if type(layer) is nn.Linear or not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    try:
        out = layer(torch.zeros(2, 3, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(out, torch.Tensor) and out.shape == (2, 3, layer.out_features)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Linear, whose matrix lies the other way round."""
    return type(module).__name__ == "Conv1D"


def _is_wrapper(module: nn.Module) -> bool:
    """PEFT's layer around one of the model."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _adapters(model: nn.Module) -> dict[str, int]:
    """Weights of each adapter by the path of what it adapts."""
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if _is_wrapper(module):
            path, parameter = name.replace(".base_layer", ""), getattr(module, "parameter_name", None)
            own = (p for n, p in module.named_parameters() if n.startswith("lora_"))
            found[f"{path}.{parameter}" if parameter else path] += sum(p.numel() for p in own)
    return dict(found)


def _names(name: str, path: str) -> bool:
    """Whether a name as people write it means this path: its end, or the module that owns the parameter at its end."""
    return _ends_with(path, name) or _ends_with(path.rpartition(".")[0], name) or _ends_with(f"{path}.weight", name)


def _means_router(name: str) -> bool:
    """Whether a router may be meant: `gate` and `router.layer` are names of one; `down_proj` is none, although a router may have one."""
    parts = name.split(".")
    return len(parts) > 1 or any(_GATES.fullmatch(part) for part in parts)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _before_stacking(name: str, names: Sequence[str], found: dict[str, Matrix]) -> set[str]:
    """Stacked experts that were layers of this name once; of two that lie in one parameter both must be named."""
    last = name.rpartition(".")[2]
    new = _STACKED_FROM.get(last)
    pair = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}.get(last)
    if new is None or (pair is not None and name.removesuffix(last) + pair not in names):
        return set()
    old_style = last.startswith("w") and any(_names(last, path) for path in found)
    end = name.removesuffix(last) + new
    return set() if old_style else {path for path, each in found.items() if each.form == "stacked" and _ends_with(path, end)}


def _matched(pattern: str, found: dict[str, Matrix]) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        message = f"{pattern!r} is the name of no layer, and no regular expression: {error}"
        raise ConfigError(Problem(code="lora.no-such-module", message=message, where="lora.target_modules")) from error
    return {path for path in found if compiled.fullmatch(path) or compiled.fullmatch(f"{path}.weight")}


def _no_such(model: PreTrainedModel, missing: Sequence[str], found: Sequence[Matrix] | object) -> Problem:
    """Why these names give no adapter, and which would."""
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
    """What a name means that names no weight with an adapter."""
    last = name.rpartition(".")[2]
    stacked = _STACKED_FROM.get(last)
    if stacked is not None and any(each.form == "stacked" and _ends_with(each.path, stacked) for each in every):
        return f"{name} is a part of {stacked}, in which the experts are stacked"
    hit = next((each for each in every if _names(name, each.path)), None)
    if hit is not None:
        return f"{name} is the output head" if hit.form == "head" else f"{name} has a form for which PEFT has no adapter"
    outside = next((path for path, _ in model.named_modules() if _ends_with(path, name)), None)
    if outside is not None:
        module = dict(model.named_modules())[outside]
        if isinstance(module, nn.Embedding):
            return f"{name} is an embedding"
        return f"{name} is only in {outside.rpartition('.')[0]}, which reads no text" if OTHER_SENSES.search(outside) else None
    return None


def kind(matrix: Matrix) -> str:
    """Its name within a layer: q_proj; experts.gate_up_proj; router.layer."""
    parts = [part for part in matrix.path.split(".") if not part.isdigit()]
    if matrix.form == "linear" or matrix.form == "head":
        return parts[-1]
    return ".".join(parts[-2:]).removesuffix(".weight") if parts[-1] != "weight" else ".".join(parts[-3:-1])
