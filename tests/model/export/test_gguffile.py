"""What is written into GGUF files is what was trained: tensors of every family, quantised within their step, and the adapter alone."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.model.export.test_merge import save_adapter
from tests.support.models import save_tiny, tiny_config

from llamahome.data.text.tokens import load_tokenizer
from llamahome.errors import ConfigError
from llamahome.exported_model import tokenizer_facts
from llamahome.model.export.architectures import architecture_of, permuted, rotary_tensors
from llamahome.model.export.gguffile import QUANTS, GgufWeights, gguf_config, write_adapter_gguf, write_gguf
from llamahome.model.export.merge import TrainedWeights
from llamahome.model.export.verify import load_plain, logits_of, stream
from llamahome.model.export.vocabulary import TokenizerFacts

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "stablelm": ("stablelm", {}),
    "mixtral": ("mixtral", {}),
    "qwen2-moe": ("qwen2-moe", {}),
    "qwen3-moe": ("qwen3-moe", {}),
    "olmoe": ("olmoe", {}),
}
PROMPTS = [[5, 9, 200, 31], [7, 8, 9, 10, 11, 12]]


def read_facts(folder: Path) -> TokenizerFacts:
    return tokenizer_facts(load_tokenizer(folder))


def export_tiny(folder: Path, family: str, *, quant: str, **changes: Any) -> tuple[Path, Path]:
    """A tiny model of the family and its GGUF file."""
    kind, own = FAMILIES[family]
    base = save_tiny(folder / "base", kind, **{**own, **changes})
    path = folder / "model.gguf"
    write_gguf(path, TrainedWeights(base), gguf_config(base), read_facts(base), quant=quant, name="tiny")
    return base, path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_in_float32_gives_the_logits_of_the_model(family: str, tmp_path: Path) -> None:
    base, path = export_tiny(tmp_path, family, quant="f32")
    read = GgufWeights(path, gguf_config(base), TrainedWeights(base).shapes)
    model = stream(base, read.read, read)
    assert model is not None
    for mine, theirs in zip(logits_of(load_plain(base), PROMPTS), logits_of(model, PROMPTS), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant", QUANTS)
def test_numbers_are_off_by_less_than_a_step_of_their_type(quant: str, tmp_path: Path) -> None:
    base, path = export_tiny(tmp_path, "llama", quant=quant, hidden_size=64, intermediate_size=96)
    weights = TrainedWeights(base)
    read = GgufWeights(path, gguf_config(base), weights.shapes)
    step = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 2 / 127, "q5_1": 2 / 31, "q5_0": 2 / 15, "q4_1": 2 / 15, "q4_0": 2 / 7}[quant]
    for name, shape in weights.shapes.items():
        expected = weights.read(name)
        off = (read.read(name) - expected).abs().max().item()
        assert off <= (step if len(shape) == 2 else 0.0) * expected.abs().max().item(), name


def test_the_file_names_tokens_ends_and_the_chat_template(tmp_path: Path) -> None:
    base, path = export_tiny(tmp_path, "llama", quant="f16")
    facts, fields = read_facts(base), gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == facts.ends[0]
    assert fields["tokenizer.chat_template"].contents() == facts.chat_template
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 320
    assert tokens[facts.ends[0]] == "<|im_end|>"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize(
    "settings", [{"r": 3, "lora_alpha": 7, "use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"r": 12}], ids=["lora", "vera"]
)
def test_the_adapter_alone_adds_what_it_adds_in_peft(tmp_path: Path, settings: dict) -> None:
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    weights, config = TrainedWeights(base, adapter), gguf_config(base)
    write_adapter_gguf(tmp_path / "adapter.gguf", weights, config, name="tiny")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    for name, in_file in (
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
    ):
        a, b = tensors[f"{in_file}.lora_a"], tensors[f"{in_file}.lora_b"]
        added = (alpha / a.shape[0]) * b @ a
        expected = weights.read(name) - TrainedWeights(base).read(name)
        expected = permuted(expected, config["num_attention_heads"]) if "q_proj" in name else expected
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


def test_frequency_factors_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = tiny_config("llama", rope_parameters=rope, hidden_size=256)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    torch.testing.assert_close(plain / rotary_tensors(config.to_dict())["rope_freqs.weight"], expected)


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("gpt2", {}, "gpt2"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "dynamic"),
        ("llama-mha", {}, "biases"),
        ("gemma2", {"query_pre_attn_scalar": 17}, "query_pre_attn_scalar"),
        ("gemma3", {}, "6th layer"),
    ],
)
def test_what_llama_cpp_computes_in_another_way_is_refused(kind: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as error:
        architecture_of(tiny_config(kind, **changes).to_dict())
    assert error.value.problems[0].code == "export.unsupported"
    assert why in error.value.problems[0].message
