"""Which model families can be written as GGUF, and what llama.cpp needs to know of each: metadata, and how tensors are laid out.

What llama.cpp computes in another way than the config says is refused here, because such a file would load and answer wrongly.
Source: llama.cpp's file format and conversion rules (github.com/ggml-org/llama.cpp). tests/model/export checks them with a real llama.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamahome.errors import ConfigError, Problem
from llamahome.model.export.experts import add_expert_metadata, wrong_experts


@dataclass(frozen=True)
class Architecture:
    """How one family is written."""

    name: str
    """llama.cpp's name."""
    permutes: bool = False
    """Whether rows of the query and key projections change their order: llama.cpp rotates neighbouring pairs in this family."""
    norm_plus_one: bool = False
    """Whether 1 is added to the weights of norms, which the family stores without it."""
    pattern: int = 0
    """Every n-th layer attends to everything, the others within a window; 0 where all layers are alike."""


ARCHITECTURES = {
    "llama": Architecture("llama", permutes=True),
    "mistral": Architecture("llama", permutes=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_plus_one=True),
    "gemma2": Architecture("gemma2", norm_plus_one=True, pattern=2),
    "gemma3_text": Architecture("gemma3", norm_plus_one=True, pattern=6),
    "phi3": Architecture("phi3"),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", permutes=True),
    "granite": Architecture("granite", permutes=True),
    "cohere": Architecture("command-r"),
    "cohere2": Architecture("cohere2", pattern=4),
    "stablelm": Architecture("stablelm"),
    "mixtral": Architecture("llama", permutes=True),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3_moe": Architecture("qwen3moe"),
    "olmoe": Architecture("olmoe"),
}
"""By model_type in config.json."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family of a config. Raises ConfigError export.unsupported where no GGUF of it can be right."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(_unsupported(f"GGUF files are written of {known}; this model is {kind!r}", hint="--to merged"))
    found = ARCHITECTURES[kind]
    wrong = (_wrong_windows(config, found), _wrong_scale(config, kind), _wrong_rotary(config), _wrong_parts(config), wrong_experts(config))
    for why in wrong:
        if why is not None:
            raise ConfigError(_unsupported(f"llama.cpp would compute this {kind} model in another way: {why}", hint="--to merged"))
    return found


def _unsupported(message: str, *, hint: str | None = None) -> Problem:
    return Problem(code="export.unsupported", message=message, where="--to", hint=hint)


def _wrong_windows(config: Mapping[str, Any], architecture: Architecture) -> str | None:
    kinds = config.get("layer_types")
    if not kinds:
        return None
    if architecture.pattern:
        whole = [kind == "full_attention" for kind in kinds]
        expected = [(number + 1) % architecture.pattern == 0 for number in range(len(kinds))]
        return None if whole == expected else f"it lets every {architecture.pattern}th layer attend to everything, and these layers differ"
    return "some of its layers attend within a window" if "sliding_attention" in kinds else None


def _wrong_scale(config: Mapping[str, Any], kind: str) -> str | None:
    if kind not in ("gemma2", "gemma3_text"):
        return None
    scalar, head = config.get("query_pre_attn_scalar"), config.get("head_dim")
    large = config.get("num_hidden_layers") == {"gemma2": 46, "gemma3_text": 62}[kind]
    expected = config["hidden_size"] // config["num_attention_heads"] if large else head
    return None if scalar in (None, expected) else f"query_pre_attn_scalar is {scalar}, not {expected}"


def _wrong_rotary(config: Mapping[str, Any]) -> str | None:
    kind = _rope(config).get("rope_type") or _rope(config).get("type") or "default"
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        return f"its rotary scaling is {kind!r}"
    if config.get("model_type") == "smollm3":
        layers, rotated = int(config["num_hidden_layers"]), config.get("no_rope_layers")
        if rotated and [bool(each) for each in rotated] != [(number + 1) % 4 != 0 for number in range(layers)]:
            return "it leaves every 4th layer without rotary positions, and these layers differ"
    share = rotated_share(config)
    return None if share == 1.0 or config.get("model_type") == "stablelm" else f"only {share:.0%} of each head is rotated"


def rotated_share(config: Mapping[str, Any]) -> float:
    """The share of each head that is rotated."""
    usual = 0.25 if config.get("model_type") == "stablelm" else 1.0
    return float(_rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or usual)


def _wrong_parts(config: Mapping[str, Any]) -> str | None:
    if config.get("mlp_bias"):
        return "its feed-forward layers have biases"
    if config.get("model_type") == "stablelm" and config.get("qk_layernorm"):
        return "it normalises queries and keys by heads"
    activation = config.get("hidden_activation") or config.get("hidden_act") or config.get("activation_function")
    wanted = ("gelu_pytorch_tanh", "gelu") if str(config.get("model_type")).startswith("gemma") else ("silu", "swish")
    return None if activation in (*wanted, None) else f"its activation is {activation}"


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of rotary positions: of the layers that attend to everything where there are two kinds."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found.get("full_attention", found) if isinstance(found, Mapping) else {}


def head_size(config: Mapping[str, Any]) -> int:
    """Numbers of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of rotary frequencies."""
    return float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0)


def add_metadata(writer: Any, config: Mapping[str, Any], *, rows: int) -> None:
    """Write what llama.cpp reads from `config` into a GGUFWriter; `rows` are those of the embedding."""
    heads = int(config["num_attention_heads"])
    writer.add_context_length(int(config.get("max_position_embeddings", 2048)))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    if "layer_norm_eps" in config:
        writer.add_layer_norm_eps(float(config["layer_norm_eps"]))
    else:
        writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_rope_dimension_count(int(head_size(config) * rotated_share(config)))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(rows)
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(int(config["sliding_window"]))
    for key, add in _scales(writer).items():
        if config.get(key) is not None:
            add(float(config[key]))
    add_expert_metadata(writer, config)
    _add_rope_scaling(writer, config)


def _scales(writer: Any) -> dict[str, Any]:
    """Factors of Granite and Command R by their key in config.json."""
    return {
        "logit_scale": writer.add_logit_scale,
        "logits_scaling": writer.add_logit_scale,
        "attention_multiplier": writer.add_attention_scale,
        "residual_multiplier": writer.add_residual_scale,
        "embedding_multiplier": writer.add_embedding_scale,
    }


def _add_rope_scaling(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(original or config["max_position_embeddings"] / float(rope["factor"])))
    elif kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(int(original or config["max_position_embeddings"]))
        factor = float(config["max_position_embeddings"]) / float(original or config["max_position_embeddings"])
        scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(float(original or 1)))
        writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or scale))


def rotary_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of frequency factors that GGUF files hold instead of a formula: for the scaling of Llama 3 and for longrope."""
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32) for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    size, low, high = head_size(config), float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    factor, original = float(rope.get("factor", 8.0)), float(rope.get("original_max_position_embeddings", 8192))
    lengths = 2 * math.pi * rope_theta(config) ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(lengths < original / high, torch.ones_like(lengths), torch.where(lengths > original / low, factor, between))
    return {"rope_freqs.weight": factors}


def laid_out(name: str, tensor: Tensor, config: Mapping[str, Any], architecture: Architecture) -> Tensor:
    """A tensor of the Hugging Face layout in llama.cpp's: query and key rows in its order, norms with their 1."""
    if architecture.norm_plus_one and name.endswith("norm.weight"):
        return tensor + 1
    if not architecture.permutes:
        return tensor
    if ".q_proj." in name:
        return permuted(tensor, int(config["num_attention_heads"]))
    if ".k_proj." in name:
        return permuted(tensor, int(config.get("num_key_value_heads") or config["num_attention_heads"]))
    return tensor


def as_stored(name: str, tensor: Tensor, config: Mapping[str, Any], architecture: Architecture) -> Tensor:
    """The inverse of `laid_out`."""
    if architecture.norm_plus_one and name.endswith("norm.weight"):
        return tensor - 1
    heads = int(config["num_attention_heads"])
    if architecture.permutes and ".k_proj." in name:
        heads = int(config.get("num_key_value_heads") or heads)
    if architecture.permutes and (".q_proj." in name or ".k_proj." in name):
        half = tensor.shape[0] // heads // 2
        return tensor.reshape(heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, h/2, 1, h/2 + 1, ...: the two halves that transformers rotates, as neighbouring pairs."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
