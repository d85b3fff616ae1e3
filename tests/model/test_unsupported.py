"""Models that are not text decoders are refused with the kind of model that they are."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tests.support.models import CPU, plain_model, tiny_config
from tests.support.tokenizers import save_tokenizer
from transformers import AutoConfig, PreTrainedConfig

from llamahome.errors import ConfigError
from llamahome.model.load import load_model

_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def config_of(name: str) -> PreTrainedConfig:
    made = {
        "LlavaConfig": {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": {**_SIGHT, "model_type": "clip_vision_model"}},
        "Qwen2VLConfig": {},
        "Qwen2AudioConfig": {},
        "VoxtralConfig": {},
        "CLIPConfig": {},
        "ViTConfig": {},
        "WhisperConfig": {},
        "BartConfig": {},
        "ModernBertConfig": {},
    }
    return getattr(transformers, name)(**made.get(name, {**_TEXT}))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(folder, dtype=torch.float32, device=CPU)
    (problem,) = error.value.problems
    assert problem.code == "model.unsupported" and "copy of this folder" not in (problem.hint or "")
    return problem.message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LlavaConfig", "it reads images too"),
        ("Qwen2VLConfig", "it reads images too"),
        ("Qwen2AudioConfig", "it reads sound too"),
        ("VoxtralConfig", "it reads sound too"),
        ("CLIPConfig", "it reads images too"),
        ("ViTConfig", "does not continue a text"),
        ("WhisperConfig", "it is an encoder-decoder"),
        ("BartConfig", "it is an encoder-decoder"),
        ("BertConfig", "it is an encoder"),
        ("RobertaConfig", "it is an encoder"),
        ("ModernBertConfig", "it is an encoder"),
    ],
)
def test_other_kinds_of_models_are_recognized_by_their_config(tmp_path: Path, name: str, reason: str) -> None:
    config_of(name).save_pretrained(tmp_path)
    assert reason in refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "brand-new"}, "does not know its type 'brand-new'"),
        ({"model_type": "brand-new", "auto_map": {"AutoModelForCausalLM": "code.Model"}}, "code from a model folder is never run"),
        ({"model_type": None}, "names no model_type"),
    ],
    ids=str,
)
def test_an_unknown_model_type_is_reported_as_unknown(tmp_path: Path, changes: dict, reason: str) -> None:
    values = {**tiny_config("llama").to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    assert reason in refused(tmp_path)


def test_a_classifier_is_reported_as_a_classifier(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=False)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"it is a LlamaForSequenceClassification, which does not continue a text: .*lm_head\.weight"):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


def test_a_decoder_of_a_masked_family_is_not_an_encoder(tmp_path: Path) -> None:
    """BERT can be configured as a decoder."""
    from llamahome.model.unsupported import why_no_decoder

    config = AutoConfig.for_model("bert", is_decoder=True, architectures=["BertLMHeadModel"])
    assert why_no_decoder(config, known=True, masked=True) is None
    assert why_no_decoder(plain_model("llama").config, known=True, masked=False) is None
