"""A tiny model of every decoder family that transformers knows, from its config alone: sizes shrunk by name, and a few exceptions."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 96
_MOST_WEIGHTS = 20_000_000
_SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    64: "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff block_ff_dim "
    "max_position_embeddings n_positions n_ctx seq_length context_length max_seq_len",
    32: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size hidden_dim model_dim emb_dim expert_dim "
    "moe_intermediate_size shared_expert_intermediate_size lru_width attn_hidden_size conv_dim block_dim",
    16: "q_lora_rank kv_lora_rank qk_head_dim mamba_d_head mamba_head_dim attention_window_size sliding_window",
    8: "head_dim d_kv attention_head_size global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_state state_size "
    "ssm_state_size linear_key_head_dim linear_value_head_dim chunk_size hidden_size_per_layer_input",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank linear_num_value_heads rotary_dim",
    3: "image_token_id",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads n_head_kv "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k mamba_expand expand linear_num_key_heads num_memory_blocks eos_token_id",
    1: "n_shared_experts first_k_dense_replace n_group topk_group mamba_n_groups n_groups bos_token_id decoder_start_token_id",
    0: "pad_token_id",
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
}


def tiny_family(family: str) -> PreTrainedConfig:
    """A config of at most a few layers; whatever transformers raises when it cannot be made."""
    kind: Any = CONFIG_MAPPING[family]
    values = kind().to_dict()
    own: dict[str, Any] = {name: _SIZE[name] for name, value in values.items() if name in _SIZE and type(value) is int}
    if "kv_lora_rank" in own:  # latent attention has as many keys as queries
        own["num_key_value_heads"] = own["num_attention_heads"]
    layers = values.get("layer_types") or values.get("layers_block_type")
    if isinstance(layers, list):
        kinds = list(dict.fromkeys(layers))
        kinds = kinds if len(kinds) > 1 else 2 * kinds
        own |= {"layers_block_type" if "layers_block_type" in values else "layer_types": kinds, "num_hidden_layers": len(kinds)}
    config: PreTrainedConfig = kind(**(own | _OWN.get(family, {})))
    return config


def tiny_model(family: str, *, seed: int = 0) -> PreTrainedModel | None:
    """The model with random weights; None when it has parts (vision, audio) that do not get tiny by these names."""
    config = tiny_family(family)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_WEIGHTS:
        return None
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # some architectures start whole tensors at zero, or leave them as they were in memory
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif not torch.isfinite(parameter).all():
                parameter.zero_()
    return model.eval()
