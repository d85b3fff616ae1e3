"""Models with random weights in real shapes, and random documents."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llamahome.data.records import Microbatch

_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama decoder."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool

    @property
    def values(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 131_072,
            "rope_parameters": _ROPE,
            "tie_word_embeddings": self.tied,
        }


TOY = Shape("toy", 64, 128, 2, 4, 2, 512, True)
ONE_B = Shape("1B", 2048, 8192, 16, 32, 8, 128_256, True)
EIGHT_B = Shape("8B", 4096, 14_336, 32, 32, 8, 128_256, False)


def random_model(shape: Shape, device: torch.device, *, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Create the model on the device, so that host memory never holds it."""
    config = AutoConfig.for_model(**shape.values)
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model


def lengths_of(tokens: int, mean: int, random: torch.Generator) -> tuple[int, ...]:
    """Random lengths between 0.25 and 1.75 times `mean` with the sum `tokens`, longest first."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        length = int(mean * (0.25 + 1.5 * float(torch.rand((), generator=random))))
        lengths.append(min(left, max(2, length)))
    return tuple(sorted(lengths, reverse=True))


def batch_of(lengths: tuple[int, ...], vocabulary: int, random: torch.Generator, *, target_share: float = 1.0) -> Microbatch:
    """Random tokens in documents of these lengths, of which `target_share` are targets."""
    tokens_T = torch.randint(0, vocabulary, (sum(lengths),), generator=random)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    targets_T = torch.rand(len(tokens_T), generator=random) < target_share
    targets_T[starts] = False
    targets_N = targets_T.nonzero().squeeze(1)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    return Microbatch(tokens_T, positions_T, lengths, targets_N - 1, tokens_T[targets_N], keys=tuple(range(len(lengths))))
