"""Replaces parts of a loaded decoder by kernels where they are proved equal: norms, gated feed-forward blocks and attention projections.

A part is replaced if its class has the same bytecode as Llama's (for norms: the same values). Afterwards the whole model is compared with
its original output for a few tokens, and all parts are restored if they differ. Everything else in the model runs unchanged. A replacement
sets `forward` on the module, so names, weights and saved files stay the same. Equality of values and gradients:
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
from llamahome.model.backends.backend import Backend, Documents, Pass, Scoring
from llamahome.model.backends.cpu.autotune import ProductShape, Speedups, autotune
from llamahome.model.backends.cpu.elementwise import (
    GATES,
    GatedActivation,
    NormOptions,
    RmsNorm,
    plain_gate,
    plain_norm,
    rms_norm,
    rotate_heads,
)
from llamahome.model.backends.cpu.merged_linear import MergedLinear, can_merge, merged_shape
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.few_layers import few_layers
from llamahome.model.objective import hidden_states
from llamahome.model.packing import decoder_of
from llamahome.model.precision import Precision
from llamahome.model.recompute import recomputing
from llamahome.model.stream import stream_of

_TOLERANCE = 1e-5
"""Relative distance in float32 up to which two functions are the same."""
_MODEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}
"""The same for the output of the model, by dtype of the products; measured on the starter: 2e-6 and 0.13, as rounding grows over 30
layers."""
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaAttention": lambda module: None,
    "GemmaAttention": lambda module: None,
    "GraniteAttention": lambda module: None,
    "MistralAttention": lambda module: getattr(module.config, "sliding_window", None),
    "Qwen2Attention": lambda module: module.sliding_window,
}
"""Attention classes that equal Llama's but for their window."""
_NORM_NAMES = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""The blocks of a Llama layer and the norms before them."""


@dataclasses.dataclass(frozen=True)
class FusedNorm:
    """The norm before a block, which the block's merged linear layer computes."""

    module: Any
    transform: RmsNorm


@dataclasses.dataclass(frozen=True)
class _Merger:
    """Merges linear layers; without `speedups` it does not autotune, and the kernels are used wherever they can be."""

    kernels: Kernels
    precision: Precision
    tokens: int
    speedups: dict[ProductShape, Speedups] | None
    in_file: bool
    """Whether the base is streamed, so that no copy of its weights may be kept."""

    def merge(self, *layers: nn.Module) -> MergedLinear:
        shape = merged_shape(layers, tokens=self.tokens, compute=self.precision.compute)
        if self.speedups is not None and shape not in self.speedups:
            self.speedups.update(autotune([shape], self.kernels))
        choice = (self.speedups or {}).get(shape)
        return MergedLinear(layers, compute=self.precision.compute, kernels=self.kernels, speedups=choice, in_file=self.in_file)

    def can_merge(self, *layers: nn.Module) -> bool:
        return can_merge(layers, autocast=self.precision.autocast)


def fuse(model: PreTrainedModel, backend: Backend, *, kernels: Kernels, speedups: dict[ProductShape, Speedups] | None = None) -> int:
    """Replace all supported parts of `model` in place and return their number. Call it after adapters have been added.

    Adds the measured speed-up of each product's shape to `speedups`.
    """
    precision, before = backend.precision, _probe(model, backend)
    modules = list(decoder_of(model).modules())
    merger = _Merger(kernels, precision, backend.micro_batch_tokens, speedups, stream_of(model) is not None)
    replaced = [module for module in modules if _replace(module, merger)]
    replaced += [module for module in modules if _replace_layer(module, kernels, precision)]
    after = _probe(model, backend)
    if not (after - before).norm() <= _MODEL_TOLERANCE[precision.compute] * before.norm():
        unfuse(model)
        return 0
    return len(replaced)


def unfuse(model: nn.Module) -> None:
    """Restore the original forward of every part."""
    for module in model.modules():
        module.__dict__.pop("forward", None)


@torch.no_grad()
def _probe(model: PreTrainedModel, backend: Backend) -> Tensor:
    """Hidden states of eleven tokens in two documents, [11, D] float32."""
    tokens = torch.arange(11, device=model.device) % model.config.get_text_config().vocab_size
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], device=model.device)
    with few_layers(model):
        return hidden_states(model, Pass(tokens, positions, tokens, Documents((7, 4))), backend).float()


def recomputes_activations(model: PreTrainedModel) -> bool:
    """Whether `fuse` will replace the layers of `model`, so that norms and gates are recomputed in the backward pass instead of kept."""
    layer = next((module for module in decoder_of(model).modules() if _is_llama_layer(module)), None)
    return layer is not None and _is_llama_attention(layer.self_attn) and _gate_of(layer.mlp) is not None


def _replace(module: Any, merger: _Merger) -> bool:
    kernels = merger.kernels
    if (options := _norm_options(module)) is not None:
        module.forward = functools.partial(_norm_forward, module, options, kernels)
    elif (
        (gate := _gate_of(module)) is not None and merger.can_merge(module.gate_proj, module.up_proj) and merger.can_merge(module.down_proj)
    ):
        linears = merger.merge(module.gate_proj, module.up_proj), merger.merge(module.down_proj)
        module.forward = functools.partial(_feed_forward, module, linears, gate, kernels)
    elif _is_llama_attention(module) and merger.can_merge(module.q_proj, module.k_proj, module.v_proj) and merger.can_merge(module.o_proj):
        linears = merger.merge(module.q_proj, module.k_proj, module.v_proj), merger.merge(module.o_proj)
        module.forward = functools.partial(_attention_forward, module, linears, kernels)
    else:
        return False
    return True


def _replace_layer(module: Any, kernels: Kernels, precision: Precision) -> bool:
    """Let the replaced blocks of a Llama layer compute the norms before them, so that the norms are not kept."""
    if not _is_llama_layer(module):
        return False
    norms: dict[str, FusedNorm] = {}
    for block, norm_name in _NORM_NAMES.items():
        norm = getattr(module, norm_name)
        forward = vars(norm).get("forward")
        if "forward" in vars(getattr(module, block)) and isinstance(forward, functools.partial) and forward.func is _norm_forward:
            norms[block] = FusedNorm(norm, RmsNorm(dataclasses.replace(forward.args[1], dtype=precision.compute), kernels))
    if norms:
        module.forward = recomputing(module, functools.partial(_layer_forward, module, norms))
    return bool(norms)


def _same_bytecode(function: Any, other: Any) -> bool:
    """Whether two functions have the same instructions and names."""
    first, second = (getattr(each, "__wrapped__", each).__code__ for each in (function, other))
    return (first.co_code, first.co_names, first.co_varnames) == (second.co_code, second.co_names, second.co_varnames)


def _is_llama_layer(module: Any) -> bool:
    has_parts = all(isinstance(getattr(module, name, None), nn.Module) for name in (*_NORM_NAMES, *_NORM_NAMES.values()))
    return has_parts and _same_bytecode(type(module).forward, modeling_llama.LlamaDecoderLayer.forward)


def _norm_options(module: Any) -> NormOptions | None:
    """The parameters of an RMS norm, found by comparing its output for random numbers; None for other modules."""
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
    twin, generator = copy.deepcopy(module).float().cpu(), torch.Generator().manual_seed(0)
    twin.weight.data = torch.randn(weight.shape, generator=generator)
    x = torch.randn(3, weight.shape[0], generator=generator)
    with torch.no_grad():
        expected = twin(x)
        for options in (NormOptions(eps, 0.0, None), NormOptions(eps, 1.0, None)):
            if (plain_norm(x, twin.weight, options) - expected).norm() <= _TOLERANCE * expected.norm():
                return options
    return None


def _gate_of(module: Any) -> str | None:
    """The activation of a feed-forward block of Llama's form; None for another form or activation."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    if not _same_bytecode(type(module).forward, modeling_llama.LlamaMLP.forward):
        return None
    x = torch.linspace(-6, 6, 97)
    gate_up = torch.cat([x, torch.ones_like(x)])
    expected = module.act_fn(x)
    return next((gate for gate in GATES if (plain_gate(gate_up, gate) - expected).norm() <= _TOLERANCE * expected.norm()), None)


def _is_llama_attention(module: Any) -> bool:
    """Whether attention and its rotary embedding equal Llama's."""
    rotation = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if type(module).__name__ not in _WINDOWS or not type(module).__module__.startswith("transformers.models.") or rotation is None:
        return False
    return _same_bytecode(rotation, modeling_llama.apply_rotary_pos_emb)


def _norm_forward(module: Any, options: NormOptions, kernels: Kernels, x: Tensor) -> Tensor:
    if module.weight.device.type != "cpu":
        result: Tensor = type(module).forward(module, x)
        return result
    return rms_norm(x, module.weight, options, kernels)


def _layer_forward(module: Any, norms: dict[str, FusedNorm], hidden_states: Tensor, **options: Any) -> Tensor:
    def run(block: str, x: Tensor, **options: Any) -> Any:
        if block in norms:
            return getattr(module, block)(x, norm=norms[block], **options)
        return getattr(module, block)(getattr(module, _NORM_NAMES[block])(x), **options)

    attended, _ = run("self_attn", hidden_states, **options)
    residual: Tensor = hidden_states + attended
    result: Tensor = residual + run("mlp", residual)
    return result


def _feed_forward(
    module: Any, linears: tuple[MergedLinear, MergedLinear], gate: str, kernels: Kernels, x: Tensor, *, norm: FusedNorm | None = None
) -> Tensor:
    gate_up, down = linears
    if not (gate_up.usable and down.usable):
        result: Tensor = type(module).forward(module, norm.module(x) if norm else x)
        return result
    return down(_normed_product(gate_up, norm, x), transform=GatedActivation(gate, kernels, overwrites=not gate_up.scaled))


def _normed_product(linear: MergedLinear, norm: FusedNorm | None, x: Tensor) -> Tensor:
    return linear(x, norm.module.weight, transform=norm.transform) if norm else linear(x)


def _attention_forward(
    module: Any,
    linears: tuple[MergedLinear, MergedLinear],
    kernels: Kernels,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    past_key_values: Any = None,
    *,
    norm: FusedNorm | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    qkv, output = linears
    unsupported = past_key_values is not None or module.config._attn_implementation != ATTENTION_NAME or hidden_states.shape[0] != 1
    if unsupported or not (qkv.usable and output.usable):
        x = norm.module(hidden_states) if norm else hidden_states
        result: tuple[Tensor, None] = type(module).forward(module, x, position_embeddings, past_key_values=past_key_values, **options)
        return result
    cosine_TE, sine_TE = (angle[0] for angle in position_embeddings)
    qkv_TO = _normed_product(qkv, norm, hidden_states)[0]
    size = module.head_dim
    heads = module.q_proj.out_features // size, module.k_proj.out_features // size
    q, k, v = rotate_heads(qkv_TO, cosine_TE, sine_TE, heads=heads, kernels=kernels)
    dropout = module.attention_dropout if module.training else 0.0
    scoring = Scoring(scale=module.scaling, window=_WINDOWS[type(module).__name__](module), dropout=dropout)
    out = options["attend"](q, k, v, options["documents"], scoring)
    return output(out.reshape(1, out.shape[0], -1)), None
