"""Tiny mixture-of-experts models of transformers, with all forms of routers, shared experts and stacked experts."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

_SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", {"num_key_value_heads": 2, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3-next": (
        "Qwen3NextConfig",
        {**_GROUPED, "num_experts": 16, "shared_expert_intermediate_size": 16, "layer_types": ["full_attention", "full_attention"]},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**_GROUPED, "num_experts": 4}),
    "olmoe": ("OlmoeConfig", {"num_key_value_heads": 2, "num_experts": 4}),
    "phimoe": ("PhimoeConfig", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "granitemoe-shared": ("GraniteMoeSharedConfig", {"num_key_value_heads": 2, "num_local_experts": 4, "shared_intermediate_size": 16}),
    "jetmoe": ("JetMoeConfig", {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4}),
    "deepseek-v2": ("DeepseekV2Config", {**_LATENT, **_ROUTED}),
    "deepseek-v3": ("DeepseekV3Config", {**_LATENT, **_ROUTED}),
    "glm4-moe": ("Glm4MoeConfig", {**_GROUPED, **_ROUTED}),
    "ernie": (
        "Ernie4_5_MoeConfig",
        {"num_key_value_heads": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "dots": ("Dots1Config", {**_GROUPED, **_ROUTED}),
    "minimax": ("MiniMaxM2Config", {**_GROUPED, "num_local_experts": 4}),
    "hunyuan": ("HunYuanMoEV1Config", {**_GROUPED, "num_experts": 4, "moe_topk": 2}),
    "gpt-oss": ("GptOssConfig", {**_GROUPED, "num_local_experts": 4}),
    "llama4": ("Llama4TextConfig", {**_GROUPED, "num_local_experts": 4, "intermediate_size_mlp": 48}),
    "flex-olmo": ("FlexOlmoConfig", {"num_key_value_heads": 2, "num_experts": 4}),
}
ROUTERS = r"\.(gate|router)(\.wg|\.layer|\.weight)?\.lora_|shared_expert_gate"
"""Matches parameter names of an adapter on a router of any family."""


def tiny_experts(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode, with weights so large that few tokens reach every expert."""
    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**{**_SHAPE, **own, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        with torch.no_grad():
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def some_tokens(*, rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(4, 96, (rows, length), generator=torch.Generator().manual_seed(7))
