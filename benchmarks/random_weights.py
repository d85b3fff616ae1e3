"""Random weights of a shape of Llama, for benchmarks of bases that nothing has to be learned from."""

import math
from pathlib import Path

import torch
from transformers import LlamaConfig

from llamahome.model.export.weightstore import write_shards


def write_random_weights(folder: Path, config: LlamaConfig) -> None:
    """Write bfloat16 weights of this shape into the new `folder`, one tensor in memory at a time; head and embedding are tied."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = config.num_key_value_heads * (hidden // heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    attention = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}.weight": (rows, hidden) for name, rows in attention.items()}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)

    def make(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=1 / math.sqrt(shape[1]))

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    write_shards(folder, [(name, torch.bfloat16, shape) for name, shape in shapes.items()], make)
