"""The limits of a model are read from its files and agree with the model in transformers."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import KINDS, VOCABULARY, our_model, plain_model
from transformers import AutoModelForCausalLM

from llamahome.model.end_tokens import name_ends
from llamahome.model.limits import ModelLimits, limits_from, limits_of, lost_ids

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
"""Learned tables, two of them with extra rows for padding, and tables of fixed size."""
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
def test_the_position_limit_is_the_longest_row_that_transformers_computes(tmp_path: Path, kind: str) -> None:
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
def test_rotary_positions_have_a_trained_length_but_no_limit(tmp_path: Path, scaling: dict[str, Any] | None, length: int) -> None:
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
def test_models_that_compute_any_position_have_no_limit(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    folder, _ = saved(tmp_path, kind, **settings)
    assert limits_of(folder).positions is None


def test_limits_come_from_the_text_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x", "text_config": {"vocab_size": 7, "max_position_embeddings": 9}}')
    assert limits_of(tmp_path) == ModelLimits(positions=None, trained_length=9, vocabulary=7)


def test_positions_of_an_image_do_not_limit_a_row() -> None:
    shapes = {"model.vision_tower.embeddings.position_embedding.weight": (5, 32), "model.audio_tower.embed_positions.weight": (9, 32)}
    assert limits_from({"max_position_embeddings": 512}, shapes).positions is None
    assert limits_from({"max_position_embeddings": 512}, {**shapes, "transformer.wpe.weight": (512, 32)}).positions == 512


@pytest.mark.parametrize(("padding", "kept"), [(39, True), (-1, False), (40, False), (-41, False), (None, True)])
def test_a_model_loads_without_a_padding_id_that_has_no_row(tmp_path: Path, padding: int | None, kept: bool) -> None:
    saved(tmp_path, "LlamaConfig", **_ROTARY)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "pad_token_id": padding}))
    assert our_model(tmp_path).config.pad_token_id == (padding if kept else None)


def test_unreadable_weights_set_no_limit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 7}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 30)
    assert limits_of(tmp_path).positions is None


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_rows_of_a_saved_model_match_its_config_and_one_row_less_does_not(tmp_path: Path, kind: str) -> None:
    plain_model(kind).save_pretrained(tmp_path)
    assert limits_of(tmp_path).table is None
    config = json.loads((tmp_path / "config.json").read_text())
    for rows in (VOCABULARY - 1, VOCABULARY + 1):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        table = limits_of(tmp_path).table
        assert table is not None and table.rows == VOCABULARY and table.alone


@given(st.lists(st.integers(0, 30), max_size=4), st.integers(1, 30))
def test_ids_are_lost_if_the_embedding_has_no_row_for_them(ids: list[int], rows: int) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        lost = [one.number for one in lost_ids(Path(folder), rows)]
        name_ends(Path(folder), Path(folder), (), rows=rows)
        kept = json.loads((Path(folder) / "generation_config.json").read_text()).get("eos_token_id", [])
    table = torch.nn.Embedding(rows, 1)
    for number in ids:
        try:
            table(torch.tensor(number))
            assert number not in lost and number in kept
        except IndexError:
            assert number in lost and number not in kept
