"""Replace parts of a loaded decoder by passes of our own where they are proved equal: norms, gated feed-forward, attention's projections.

A part is replaced when its class computes, statement by statement, what Llama's does (norms: when its values do), and the whole model
is then compared with itself on a few tokens; where they differ everything is put back. Anything else in the model runs as it is.
Replacing sets `forward` on the module, so names, weights and what is saved stay the same. Equality of values and gradients:
tests/model/backends/cpu/test_fuse.py.
"""

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from llamahome.model.attention import ATTENTION_NAME
from llamahome.model.backends.backend import Backend, Pass, Scoring
from llamahome.model.backends.cpu.elementwise import GATES, Gated, Norm, Normed, norm, plain_gate, plain_norm, rotated
from llamahome.model.backends.cpu.linears import Fan, can_fan, fan_shape
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.race import Shape, Speeds, race
from llamahome.model.backends.documents import Documents
from llamahome.model.decoder import decoder_of
from llamahome.model.objective import hidden_states
from llamahome.model.precision import Precision

_SAME = 1e-5
"""Relative distance in float32 at which two ways to compute the same are the same."""
_SAME_MODEL = {torch.float32: 1e-4, torch.bfloat16: 0.3}
"""The same after all layers, in the type of the products; measured on the starter: 2e-6 and 0.13, rounding grows over 30 layers."""
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaAttention": lambda module: None,
    "GemmaAttention": lambda module: None,
    "GraniteAttention": lambda module: None,
    "MistralAttention": lambda module: getattr(module.config, "sliding_window", None),
    "Qwen2Attention": lambda module: module.sliding_window,
}
"""Attention classes that are Llama's but for the window that they pass on."""
_HALVES = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""The parts of a layer of Llama's form and the norms before them."""


@dataclasses.dataclass(frozen=True)
class Before:
    """The norm in front of a part, for the part to make."""

    norm: Any
    reading: Normed


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Makes fans whose products were raced; without `speeds` ours are taken wherever they are there."""

    kernels: Kernels
    precision: Precision
    tokens: int
    speeds: dict[Shape, Speeds] | None

    def fan(self, *layers: nn.Module) -> Fan:
        shape = fan_shape(layers, tokens=self.tokens, compute=self.precision.compute)
        if self.speeds is not None and shape not in self.speeds:
            self.speeds.update(race([shape], self.kernels))
        return Fan(layers, compute=self.precision.compute, kernels=self.kernels, speeds=(self.speeds or {}).get(shape))


def fuse(model: PreTrainedModel, backend: Backend, *, kernels: Kernels, speeds: dict[Shape, Speeds] | None = None) -> int:
    """Replace what can be replaced in `model`, in place; returns how many parts. Call it after adapters have been added.

    `speeds` are filled with what the products of each shape were raced to.
    """
    precision, before = backend.precision, _probe(model, backend)
    parts = list(decoder_of(model).modules())
    make = _Maker(kernels, precision, backend.micro_batch_tokens, speeds)
    replaced = [module for module in parts if _replace(module, make)]
    replaced += [module for module in parts if _replace_layer(module, kernels, precision)]
    after = _probe(model, backend)
    if not (after - before).norm() <= _SAME_MODEL[precision.compute] * before.norm():
        unfuse(model)
        return 0
    return len(replaced)


def unfuse(model: nn.Module) -> None:
    """Give every part its own forward back."""
    for module in model.modules():
        module.__dict__.pop("forward", None)


@torch.no_grad()
def _probe(model: PreTrainedModel, backend: Backend) -> Tensor:
    """Hidden states of eleven tokens in two documents, [11, D] float32."""
    tokens = torch.arange(11, device=model.device) % model.config.get_text_config().vocab_size
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], device=model.device)
    return hidden_states(model, Pass(tokens, positions, tokens, Documents((7, 4))), backend).float()


def keeps_little(model: PreTrainedModel) -> bool:
    """Whether the layers of `model` have the form whose norms and gates are made again instead of kept, once they are replaced."""
    layer = next((each for each in decoder_of(model).modules() if _has_form(each)), None)
    return layer is not None and _is_attention(layer.self_attn) and _gate_of(layer.mlp) is not None


def _replace(module: Any, make: _Maker) -> bool:
    kernels, precision = make.kernels, make.precision
    if (how := _norm_of(module)) is not None:
        module.forward = functools.partial(_norm_forward, module, how, kernels)
    elif (kind := _gate_of(module)) is not None and _can(precision, [module.gate_proj, module.up_proj], [module.down_proj]):
        inner = make.fan(module.gate_proj, module.up_proj)
        outer = make.fan(module.down_proj)
        module.forward = functools.partial(_feed_forward, module, (inner, outer), kind, kernels)
    elif _is_attention(module) and _can(precision, [module.q_proj, module.k_proj, module.v_proj], [module.o_proj]):
        inner = make.fan(module.q_proj, module.k_proj, module.v_proj)
        outer = make.fan(module.o_proj)
        module.forward = functools.partial(_attention_forward, module, (inner, outer), kernels)
    else:
        return False
    return True


def _replace_layer(module: Any, kernels: Kernels, precision: Precision) -> bool:
    """Let the replaced parts of a layer of Llama's form make the norms of what they read themselves, so that these are not kept."""
    if not _has_form(module):
        return False
    norms: dict[str, Before] = {}
    for part, name in _HALVES.items():
        made = getattr(module, name)
        own = vars(made).get("forward")
        if "forward" in vars(getattr(module, part)) and isinstance(own, functools.partial) and own.func is _norm_forward:
            norms[part] = Before(made, Normed(dataclasses.replace(own.args[1], dtype=precision.compute), kernels))
    if norms:
        module.forward = functools.partial(_layer_forward, module, norms)
    return bool(norms)


def _can(precision: Precision, *fans: list[nn.Module]) -> bool:
    return all(can_fan(layers, autocast=precision.autocast) for layers in fans)


def _same_code(function: Any, other: Any) -> bool:
    """Two functions consist of the same instructions on the same names."""
    first, second = (getattr(each, "__wrapped__", each).__code__ for each in (function, other))
    return (first.co_code, first.co_names, first.co_varnames) == (second.co_code, second.co_names, second.co_varnames)


def _has_form(module: Any) -> bool:
    """A layer of Llama's form."""
    parts = all(isinstance(getattr(module, name, None), nn.Module) for name in (*_HALVES, *_HALVES.values()))
    return parts and _same_code(type(module).forward, modeling_llama.LlamaDecoderLayer.forward)


def _norm_of(module: Any) -> Norm | None:
    """How `module` normalizes, judged by what it does with random numbers; None when it is no such norm."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if (
        "RMSNorm" not in type(module).__name__
        or not isinstance(eps, float)
        or weight is None
        or weight.ndim != 1
        or list(module.children())
    ):
        return None
    twin, random = copy.deepcopy(module).float().cpu(), torch.Generator().manual_seed(0)
    twin.weight.data = torch.randn(weight.shape, generator=random)
    x = torch.randn(3, weight.shape[0], generator=random)
    with torch.no_grad():
        wanted = twin(x)
        for how in (Norm(eps, 0.0, None), Norm(eps, 1.0, None)):
            if (plain_norm(x, twin.weight, how) - wanted).norm() <= _SAME * wanted.norm():
                return how
    return None


def _gate_of(module: Any) -> str | None:
    """Which gate a feed-forward block of Llama's form has; None when it has another form or gate."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    if not _same_code(type(module).forward, modeling_llama.LlamaMLP.forward):
        return None
    x = torch.linspace(-6, 6, 97)
    both = torch.cat([x, torch.ones_like(x)])
    wanted = module.act_fn(x)
    return next((kind for kind in GATES if (plain_gate(both, kind) - wanted).norm() <= _SAME * wanted.norm()), None)


def _is_attention(module: Any) -> bool:
    """Attention as Llama's, with rotary positions as Llama's."""
    rotation = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if type(module).__name__ not in _WINDOWS or not type(module).__module__.startswith("transformers.models.") or rotation is None:
        return False
    return _same_code(rotation, modeling_llama.apply_rotary_pos_emb)


def _norm_forward(module: Any, how: Norm, kernels: Kernels, x: Tensor) -> Tensor:
    if module.weight.device.type != "cpu":
        result: Tensor = type(module).forward(module, x)
        return result
    return norm(x, module.weight, how, kernels)


def _layer_forward(module: Any, norms: dict[str, Before], hidden_states: Tensor, **options: Any) -> Tensor:
    def part(name: str, x: Tensor, **more: Any) -> Any:
        if name in norms:
            return getattr(module, name)(x, before=norms[name], **more)
        return getattr(module, name)(getattr(module, _HALVES[name])(x), **more)

    attended, _ = part("self_attn", hidden_states, **options)
    between: Tensor = hidden_states + attended
    result: Tensor = between + part("mlp", between)
    return result


def _feed_forward(module: Any, fans: tuple[Fan, Fan], kind: str, kernels: Kernels, x: Tensor, *, before: Before | None = None) -> Tensor:
    inner, outer = fans
    if not (inner.usable and outer.usable):
        result: Tensor = type(module).forward(module, before.norm(x) if before else x)
        return result
    return outer(_through(inner, before, x), reading=Gated(kind, kernels))


def _through(fan: Fan, before: Before | None, x: Tensor) -> Tensor:
    return fan(x, before.norm.weight, reading=before.reading) if before else fan(x)


def _attention_forward(
    module: Any,
    fans: tuple[Fan, Fan],
    kernels: Kernels,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    past_key_values: Any = None,
    *,
    before: Before | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    inner, outer = fans
    foreign = past_key_values is not None or module.config._attn_implementation != ATTENTION_NAME or hidden_states.shape[0] != 1
    if foreign or not (inner.usable and outer.usable):
        x = before.norm(hidden_states) if before else hidden_states
        result: tuple[Tensor, None] = type(module).forward(module, x, position_embeddings, past_key_values=past_key_values, **options)
        return result
    cosine_TE, sine_TE = (angle[0] for angle in position_embeddings)
    all_TO = _through(inner, before, hidden_states)[0]
    size = module.head_dim
    heads = module.q_proj.out_features // size, module.k_proj.out_features // size
    q, k, v = rotated(all_TO, cosine_TE, sine_TE, heads=heads, kernels=kernels)
    dropout = module.attention_dropout if module.training else 0.0
    scoring = Scoring(scale=module.scaling, window=_WINDOWS[type(module).__name__](module), dropout=dropout)
    out = options["attend"](q, k, v, options["documents"], scoring)
    return outer(out.reshape(1, out.shape[0], -1)), None
