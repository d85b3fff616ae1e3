"""Merged weights equal PEFT's own merge for every kind of adapter that is merged from files, and what cannot be is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.support.models import plain_model, save_tiny
from transformers import AutoModelForCausalLM

from llamahome.errors import ConfigError
from llamahome.model.export.merge import NotStreamable, TrainedWeights
from llamahome.model.export.merged import write_merged
from llamahome.model.export.weightstore import WeightStore, write_shards
from llamahome.model.lora import quiet_peft

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 9, "lora_alpha": 3, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.v_proj": 3}, "alpha_pattern": {"up_proj": 5}},
    "rows": {"r": 4, "lora_alpha": 8, "trainable_token_indices": {"embed_tokens": [3, 7, 319]}},
    "vera": {"r": 12},
    "whole head": {"r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
}


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter on `base` whose values are not the first ones, as PEFT saves it."""
    torch.manual_seed(1)
    kind = LoraConfig if "lora_alpha" in settings else VeraConfig
    config = kind(task_type="CAUSAL_LM", target_modules="all-linear", **settings)
    with quiet_peft():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_weights_are_those_of_pefts_merge(kind: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", tie_word_embeddings=kind != "whole head")
    adapter = save_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    with quiet_peft():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().state_dict()
    weights = TrainedWeights(base, adapter)
    assert set(weights.shapes) <= set(expected)
    for name in weights.shapes:
        torch.testing.assert_close(weights.read(name), expected[name], rtol=1e-5, atol=1e-5)


def test_only_what_the_adapter_names_is_changed(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    weights = TrainedWeights(base, save_adapter(base, tmp_path / "adapter", r=2, lora_alpha=4))
    stored = load_file(base / "model.safetensors")
    same = {name for name in weights.shapes if torch.equal(weights.read(name), stored[name].float())}
    assert set(weights.shapes) - same == set(weights.changed)
    assert weights.changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_folder_loads_in_transformers_with_the_same_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen3")
    weights = TrainedWeights(base, save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8))
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", weights, base=base, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype
    for name, value in model.state_dict().items():
        if name in weights.shapes:
            torch.testing.assert_close(value, weights.read(name).to(dtype))


def test_shards_stay_below_their_limit_and_load_as_one_model(tmp_path: Path) -> None:
    model = plain_model("llama", tie_word_embeddings=False)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    listed = [(name, torch.float32, tuple(value.shape)) for name, value in tensors.items()]
    files = write_shards(tmp_path, listed, lambda name: tensors[name], largest=50_000)
    assert len(files) > 1
    assert all(path.stat().st_size < 50_000 + 4_000 for path in files)
    model.config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    again = WeightStore(tmp_path)
    assert all(torch.equal(again.read(name), value) for name, value in tensors.items())


def test_an_adapter_of_another_base_is_refused_with_both_shapes(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", r=2, lora_alpha=4)
    other = save_tiny(tmp_path / "other", hidden_size=48)
    with pytest.raises(ConfigError) as error:
        TrainedWeights(other, adapter)
    assert error.value.problems[0].code == "model.weights-do-not-fit"
    assert "32" in error.value.problems[0].message
    assert "48" in error.value.problems[0].message


def test_an_adapter_with_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", r=2, lora_alpha=4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError) as error:
        TrainedWeights(base, adapter)
    assert error.value.problems[0].code == "model.weights-do-not-fit"


def test_adapters_that_only_peft_can_merge_are_named(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", r=2, lora_alpha=4)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    for changes in ({"bias": "all"}, {"target_parameters": ["experts.gate_up_proj"]}, {"peft_type": "VERA"}):
        path.write_text(json.dumps(settings | changes))
        with pytest.raises(NotStreamable):
            TrainedWeights(base, adapter)
