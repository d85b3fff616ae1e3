"""Tiny models of transformers with a tokenizer, with random weights so large that attention, caps and biases matter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tests.support.tokenizers import save_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llamahome.data.records import Example, Microbatch
from llamahome.data.steps.loader import make_microbatch
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import backend_of
from llamahome.model.load import load_model
from llamahome.model.objective import Objective
from llamahome.model.precision import Precision

VOCABULARY = 320
FP32 = Precision(torch.float32, torch.float32, "a test")
CPU = torch.device("cpu")

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "phi3": ("Phi3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "granite": (
        "GraniteConfig",
        {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "phi": ("PhiConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "gpt2": ("GPT2Config", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "deepseek": (
        "DeepseekV2Config",
        {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}
"""Grouped queries and a tied head; biases everywhere; biases on queries; norms of heads; a window shorter than the documents; a norm's
weight stored less one and another gate; q, k, v in one matrix; caps on scores and logits; scaled logits; a head with a bias;
learned positions and fused matrices; values narrower than keys, with experts."""
EXPORT_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("SmolLM3Config", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", {"head_dim": 8, "logit_scale": 0.5, "sliding_window": 5}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
}
"""More models that are exported: layers without rotary positions, layer norms, scaled logits, halves of heads rotated, experts."""
DEVICE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: KINDS[kind] for kind in ("llama", "qwen3", "phi3")},
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Models for the CUDA back end's comparison with transformers: also alternating sliding and global layers, and experts."""
NOT_PACKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "convolution": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "recurrent": ("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 5}),
    "linear": (
        "MiniMaxConfig",
        {"head_dim": 8, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    ),
    "sinks": ("GptOssConfig", {"num_local_experts": 2, "head_dim": 8, "num_experts_per_tok": 2}),
    "no-documents": ("NemotronConfig", {}),
    "own": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "state": ("MambaConfig", {}),
}
"""Models that cannot separate packed documents, or that need another attention than ours."""


def tiny_config(kind: str, **changes: Any) -> PreTrainedConfig:
    name, own = (KINDS | EXPORT_KINDS | DEVICE_KINDS | NOT_PACKABLE)[kind]
    return getattr(transformers, name)(**{**_SHAPE, **own, **changes})


def plain_model(kind: str, *, seed: int = 0, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    """A float32 model of transformers without our changes; its biases are not zero, unlike transformers' initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), attn_implementation=attention).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save_tiny(folder: Path, kind: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Save a model folder with weights and tokenizer."""
    plain_model(kind, seed=seed, **changes).save_pretrained(folder)
    return save_tokenizer(folder, vocabulary=VOCABULARY)


def our_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(folder, dtype=dtype, device=CPU).eval()


def examples_of(lengths: Sequence[int], *, seed: int = 0, target_share: float = 0.6) -> list[Example]:
    """Random examples; each has at least one target if it has at least two tokens."""
    random = np.random.default_rng(seed)
    examples = []
    for number, length in enumerate(lengths):
        targets = random.random(length) < target_share
        targets[0], targets[-1] = False, length > 1
        examples.append(Example("rows.jsonl", number, number + 1, random.integers(4, VOCABULARY, length).astype(np.int32), targets))
    return examples


def microbatch_of(examples: Sequence[Example], *, index: int = 0) -> Microbatch:
    return make_microbatch(examples, keys=range(len(examples)), index=index)


def backend_named(name: str, precision: Precision = FP32) -> Backend:
    return backend_of(name, CPU, precision)


def objective_of(model: PreTrainedModel, backend: str = "cpu", precision: Precision = FP32) -> Objective:
    """The objective with a back end that does not compile."""
    return Objective(model, backend_named(backend, precision))


def plain_loss(model: PreTrainedModel, example: Example) -> torch.Tensor:
    """Summed loss of one example in transformers' forward, from all logits."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64))
    logits = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    learned = torch.from_numpy(example.targets.nonzero()[0])
    return torch.nn.functional.cross_entropy(logits[learned - 1], tokens[learned], reduction="sum")
