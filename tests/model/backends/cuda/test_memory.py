"""Estimated memory compared with three runs on an H100 (docs/log.md)."""

import pytest
import torch
from transformers import LlamaConfig

from llamahome.config.schema import Config, LoraConfig
from llamahome.model.backends.choose import planned_backend
from llamahome.model.lora import add_lora
from llamahome.model.place import largest_pass
from llamahome.model.precision import Precision
from llamahome.model.skeleton import skeleton
from llamahome.planning.memory import Pass, ShardLayout, memory_of
from llamahome.planning.shapes import LayerShape, ModelShape

BF16 = Precision(torch.bfloat16, torch.bfloat16, "a test")
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
ONE_B = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, **HEADS)
EIGHT_B = LlamaConfig(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, tie_word_embeddings=False, **HEADS)


@pytest.mark.parametrize(("config", "tokens", "gigabytes"), [(ONE_B, 16_384, 25.0), (EIGHT_B, 8_192, 55.6), (EIGHT_B, 12_288, 74.0)])
def test_the_estimate_is_within_a_tenth_of_an_h100(config: LlamaConfig, tokens: int, gigabytes: float) -> None:
    backend = planned_backend(BF16)
    model = skeleton(config, layers=config.num_hidden_layers, dtype=torch.bfloat16)
    frozen = sum(each.numel() for each in model.parameters())
    kept = backend.kept_bytes(Config(), model, tokens, longest=tokens, compiled=True)
    add_lora(model, LoraConfig(rank=16), base="shape", seed=0, lean=True)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    empty = LayerShape(0, 0, 0, 0)
    shape = ModelShape(
        name="shape",
        layers=config.num_hidden_layers,
        layer=empty,
        rest=LayerShape(frozen, trained, 0, 0),
        hidden=config.hidden_size,
        attention=config.hidden_size,
        head=config.vocab_size * config.hidden_size,
        head_trained=False,
    )
    work = Pass(tokens, tokens, kept, 0, recomputes=False, tile_bytes=backend.tile_bytes(config.vocab_size))
    estimate = memory_of(shape, ShardLayout(1, 1, 2, 2, apart=True), work)
    assert 0.9 * gigabytes < estimate.total / 1e9 < 1.1 * gigabytes


@pytest.mark.parametrize(("config", "gigabytes", "tokens"), [(ONE_B, 80, 16_384), (EIGHT_B, 80, 8_192), (EIGHT_B, 24, 16_384)])
def test_passes_shrink_before_activations_are_recomputed(config: LlamaConfig, gigabytes: int, tokens: int) -> None:
    backend = planned_backend(BF16)
    model = skeleton(config, layers=config.num_hidden_layers, dtype=torch.bfloat16)
    free = gigabytes * 10**9 - sum(2 * each.numel() for each in model.parameters())

    def keeps(tokens: int) -> int:
        return backend.kept_bytes(Config(), model, tokens, longest=2048, compiled=True)

    assert largest_pass(backend.micro_batch_tokens, fewest=backend.min_micro_batch_tokens, keeps=keeps, free_bytes=free) == tokens


def test_uncompiled_layers_and_capped_scores_keep_more() -> None:
    backend, tokens = planned_backend(BF16), 4096
    model = skeleton(ONE_B, layers=2, dtype=torch.bfloat16)
    compiled, plain = (backend.kept_bytes(Config(), model, tokens, longest=tokens, compiled=each) for each in (True, False))
    assert compiled < plain
    model.config.attn_logit_softcapping = 50.0
    assert backend.kept_bytes(Config(), model, tokens, longest=tokens, compiled=True) > plain
