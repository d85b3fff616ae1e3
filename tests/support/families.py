"""Tiny models of every decoder family of transformers: the default config with sizes reduced by their names."""

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 96
_SIZES: dict[str, Any] = {
    r"vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|attention_hidden_size|lru_width|hidden_dim|embed_dim": 32,
    r"num_(hidden_)?layers|n_layers?|decoder_layers|encoder_layers|num_decoder_layers|num_encoder_layers": 2,
    r"num_(attention_)?heads|n_heads?|(de|en)coder_attention_heads|linear_num_value_heads": 4,
    r"num_key_value_heads|linear_num_key_heads|kv_n_heads|swa_num_key_value_heads|num_kv_heads": 2,
    r"(global_)?head_dim|linear_(key|value)_head_dim|swa_head_dim|v_head_dim|qk_nope_head_dim|attention_head_dim|kv_channels": 8,
    r"qk_rope_head_dim|rotary_dim": 4,
    r"(kv|q|o)_lora_rank|.*_lora_rank|hidden_size_per_layer_input|dt_rank|time_step_rank|altup_.*_dim": 8,
    r"(dense_)?intermediate_size(_mlp)?|n_inner|d_ff|(de|en)coder_ffn_dim|ffn_dim|ffn_hidden_size|intermediate_size_dense": 48,
    r".*(expert|moe|mlp).*intermediate_size|.*expert_ffn_hidden_size|moe_.*_size": 16,
    r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts": 4,
    r"(moe_)?num_experts_per_tok(en)?|moe_top_?k|num_experts_per_token|moe_k|top_k_experts": 2,
    r"n_group|topk_group|moe_group_num|first_k_dense_replace|num_shared_experts|n_shared_experts|moe_num_shared_experts": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|max_target_positions|block_size_positions": 128,
    r"state_size|mamba_d_state|ssm_state_size|mamba_dt_rank": 8,
    r"sliding_window(_size)?|attention_window_size|local_window|window_size": 5,
    r".*(dropout|pdrop|dropout_p|drop_rate)(_prob)?|.*layerdrop|activation_dropout|router_jitter_noise|input_jitter_noise": 0.0,
    r"initializer_range|init_std|initializer_factor": 0.2,
}
_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_DERIVED = re.compile(
    r"layer_types|mlp_layer_types|.*_layer_types|layers_block_type|block_types|architectures|dtype|transformers_version|per_layer_config|activation_sparsity_pattern"
)
"""Keys of lists with an entry per layer, which the config derives from its sizes."""
_STATE = {"hidden_size": 32, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
_DECODES = {"is_decoder": True}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "attn_layer_indices": [1], "mamba_chunk_size": 8},
    "bert": _DECODES,
    "bert-generation": _DECODES,
    "big_bird": _DECODES | {"attention_type": "original_full"},
    "camembert": _DECODES,
    "data2vec-text": _DECODES,
    "electra": _DECODES,
    "ernie": _DECODES,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"], "mamba_n_groups": 1},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "hunyuan_v1_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": _STATE,
    "megatron-bert": _DECODES,
    "ministral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rembert": _DECODES,
    "roberta": _DECODES,
    "roberta-prelayernorm": _DECODES,
    "roc_bert": _DECODES | {"pronunciation_vocab_size": 90, "shape_vocab_size": 90},
    "roformer": _DECODES,
    "xlm-roberta": _DECODES,
    "xlm-roberta-xl": _DECODES,
    "xmod": _DECODES | {"default_language": "en_XX"},
    "zamba2": {"mamba_ngroups": 1, "n_mamba_heads": 8, "chunk_size": 8},
}
"""Changes to the default config for families whose sizes do not follow the rules."""


def tiny_family(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of the family, with `changes`. Raises any error of the config class if the sizes are not valid for it."""
    default = AutoConfig.for_model(family)
    values = _shrunk(default.to_dict()) | EXCEPTIONS.get(family, {}) | changes
    if "kv_lora_rank" in values:  # queries and keys are put together from parts, one of which is rotated
        values |= {"num_key_value_heads": 4, "head_dim": 4}
    return type(default)(**values)


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    shrunk: dict[str, Any] = {}
    kinds = list(dict.fromkeys(values.get("layer_types") or ()))
    for name, value in values.items():
        if name == "num_hidden_layers" and len(kinds) > 1:  # one layer of each kind
            shrunk |= {name: len(kinds), "layer_types": kinds}
        elif (name == "layer_types" and len(kinds) > 1) or _DERIVED.fullmatch(name) or name == "model_type":
            pass
        elif name.endswith("config") and isinstance(value, dict):
            shrunk[name] = _shrunk(value)
        elif name.endswith("_token_id") or name.endswith("_token_index"):
            shrunk[name] = _TOKENS.get(name, None if value is None else VOCABULARY - 3)
        else:
            shrunk[name] = next((small for pattern, small in _SIZES.items() if re.fullmatch(pattern, name) and value is not None), value)
    return shrunk


def family_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model of transformers whose biases are not zero."""
    config = tiny_family(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
