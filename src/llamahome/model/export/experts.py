"""Experts of a mixture in GGUF files and in memory: names, metadata, and what llama.cpp computes in another way.

Hugging Face files hold each expert's matrices by themselves, GGUF files one stack [experts, out, in] for each kind of matrix, and
transformers stacks them in memory with gate and up in one. Source: llama.cpp's conversion rules (github.com/ggml-org/llama.cpp).
"""

import re
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor

_ONE = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_NORMALISES = {"qwen2_moe": False, "qwen3_moe": True, "olmoe": False}
"""Whether llama.cpp divides the weights of the chosen experts by their sum, where the config decides it in transformers."""
_COUNTS = ("num_local_experts", "num_experts")


def expert_of(name: str) -> tuple[str, int] | None:
    """The name of a stack and the number of an expert in it; None for a tensor of no single expert."""
    match = _ONE.fullmatch(name)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match is not None else None


def experts_in(config: Mapping[str, Any]) -> int:
    """The number of experts of a layer; 0 for a model without experts."""
    return next((int(config[key]) for key in _COUNTS if config.get(key)), 0)


def wrong_experts(config: Mapping[str, Any]) -> str | None:
    """What llama.cpp computes in another way than this config says, or None."""
    kind = str(config.get("model_type"))
    if kind in _NORMALISES and bool(config.get("norm_topk_prob", False)) != _NORMALISES[kind]:
        return f"norm_topk_prob is {config.get('norm_topk_prob', False)}"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "some of its layers have no experts"
    if config.get("clip_qkv"):
        return "it clips queries, keys and values"
    if kind == "olmoe" and config.get("num_key_value_heads") not in (None, config.get("num_attention_heads")):
        return "it has fewer heads of keys than of queries"
    return None


def add_expert_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """Write the number and the sizes of experts into a GGUFWriter."""
    if not (count := experts_in(config)):
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(int(config["num_experts_per_tok"]))
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(int(config["shared_expert_intermediate_size"]))


def stacked_reader(name: str, read: Callable[[str], Tensor], names: Container[str]) -> Callable[[], Tensor] | None:
    """How to make the parameter `name` of transformers from tensors of single experts; None where the files do not hold them."""
    for inner in (name, name.replace(".mlp.", ".block_sparse_moe.")):
        if inner != name and inner in names:
            return lambda inner=inner: read(inner)  # type: ignore[misc]
        block, _, kind = inner.rpartition(".")
        for first, second, last in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
            parts = {"gate_up_proj": (first, second), "down_proj": (last,)}.get(kind)
            if parts is not None and f"{block}.0.{parts[0]}.weight" in names:
                return lambda block=block, parts=parts: _stack(block, parts, read, names)  # type: ignore[misc]
    return None


def _stack(block: str, parts: tuple[str, ...], read: Callable[[str], Tensor], names: Container[str]) -> Tensor:
    experts, number = [], 0
    while f"{block}.{number}.{parts[0]}.weight" in names:
        experts.append(torch.cat([read(f"{block}.{number}.{part}.weight").float() for part in parts]))
        number += 1
    return torch.stack(experts)
