"""What a model can take is read from its files and agrees with what transformers' own model does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.support.models import our_model
from transformers import AutoModelForCausalLM

from llamahome.model.limits import ModelLimits, limits_from, limits_of

_LENGTH = 16
_TABLES: dict[str, dict[str, Any]] = {
    "GPT2Config": {"n_positions": _LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "GPTBigCodeConfig": {"n_positions": _LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "GPTNeoConfig": {
        "max_position_embeddings": _LENGTH,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "attention_types": [[["global"], 1]],
    },
    "OPTConfig": {
        "max_position_embeddings": _LENGTH,
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    },
    "BioGptConfig": {
        "max_position_embeddings": _LENGTH,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "OpenAIGPTConfig": {"n_positions": _LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "CTRLConfig": {"n_positions": _LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16},
    "GPTJConfig": {"n_positions": _LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    "CodeGenConfig": {"n_positions": _LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
}
"""Learned tables, two of them with rows kept for padding, and tables that are computed once."""
_ROTARY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def saved(folder: Path, kind: str, **settings: Any) -> tuple[Path, Any]:
    config = getattr(transformers, kind)(vocab_size=40, bos_token_id=0, eos_token_id=1, pad_token_id=None, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("kind", _TABLES)
def test_a_table_of_positions_is_as_long_as_the_rows_that_transformers_computes(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path, kind, **_TABLES[kind])
    limits = limits_of(folder)
    assert limits == ModelLimits(positions=_LENGTH, trained_length=None, vocabulary=40)
    with torch.no_grad():
        model(input_ids=torch.arange(_LENGTH)[None] + 2, use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.arange(_LENGTH + 1)[None] + 2, use_cache=False)


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
    ],
    ids=str,
)
def test_rotary_positions_have_a_trained_length_and_no_end(tmp_path: Path, scaling: dict[str, Any] | None, length: int) -> None:
    own = {} if scaling is None else {"rope_parameters": {"rope_theta": 10000.0, **scaling}}
    folder, model = saved(tmp_path, "LlamaConfig", **_ROTARY, **own)
    assert limits_of(folder) == ModelLimits(positions=None, trained_length=length, vocabulary=40)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 2 * length, dtype=torch.long), use_cache=False)


def test_a_sliding_window_is_no_limit(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "MistralConfig", **_ROTARY, sliding_window=8)
    assert limits_of(folder).trained_length == 64


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
        ("MptConfig", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16}),
        (
            "XGLMConfig",
            {"d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": 16},
        ),
    ],
    ids=["bloom", "mpt", "xglm"],
)
def test_what_computes_any_position_has_no_table(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    folder, _ = saved(tmp_path, kind, **settings)
    assert limits_of(folder).positions is None


def test_limits_are_those_of_the_text_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x", "text_config": {"vocab_size": 7, "max_position_embeddings": 9}}')
    assert limits_of(tmp_path) == ModelLimits(positions=None, trained_length=9, vocabulary=7)


def test_positions_of_an_image_are_no_limit_of_a_row() -> None:
    shapes = {"model.vision_tower.embeddings.position_embedding.weight": (5, 32), "model.audio_tower.embed_positions.weight": (9, 32)}
    assert limits_from({"max_position_embeddings": 512}, shapes).positions is None
    assert limits_from({"max_position_embeddings": 512}, {**shapes, "transformer.wpe.weight": (512, 32)}).positions == 512


@pytest.mark.parametrize(("padding", "kept"), [(39, True), (-1, True), (40, False), (-41, False), (None, True)])
def test_a_padding_id_without_a_row_is_left_out_and_the_model_loads(tmp_path: Path, padding: int | None, kept: bool) -> None:
    saved(tmp_path, "LlamaConfig", **_ROTARY)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "pad_token_id": padding}))
    assert our_model(tmp_path).config.pad_token_id == (padding if kept else None)


def test_weights_that_cannot_be_read_are_no_limit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 7}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 30)
    assert limits_of(tmp_path).positions is None
