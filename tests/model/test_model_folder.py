"""What is given as a model and is none is named as what it is, and the help line leads to a model."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.models import our_model, save_tiny

from llamahome.errors import ConfigError, Problem
from llamahome.model.load import find_model
from llamahome.model.stored_weights import unused_note
from llamahome.model.weightfiles import INDEX


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def refused(path: Path) -> Problem:
    with pytest.raises(ConfigError) as caught:
        our_model(find_model(str(path), say=print))
    return caught.value.problems[0]


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Write these tensors, whose names have __ instead of dots, into the weights of the model."""
    kept = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(kept | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def write_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_file_is_no_model_and_its_folder_may_be(folder: Path, tmp_path: Path) -> None:
    problem = refused(folder / "model.safetensors")
    assert problem.code == "model.not-found" and problem.hint == f"--model {folder}"
    spaced = folder.rename(folder.with_name("my model"))
    assert refused(spaced / "model.safetensors").hint == f"--model '{spaced}'"
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    assert "GGUF, which runs a model and cannot be trained" in refused(tmp_path / "small.gguf").message


@pytest.mark.parametrize(
    ("removed", "written", "code", "words"),
    [
        (("model.safetensors",), "small.gguf", "model.no-weights", "small.gguf holds the weights as GGUF"),
        (("model.safetensors",), "model.onnx", "model.no-weights", "as ONNX"),
        (("config.json",), "params.json", "model.no-config", "the model maker's own tools"),
        (("config.json",), "model_index.json", "model.no-config", "diffusers"),
        (("config.json", "model.safetensors"), "small.gguf", "model.no-config", "as GGUF"),
    ],
)
def test_a_folder_of_another_program_is_named(folder: Path, removed: tuple[str, ...], written: str, code: str, words: str) -> None:
    for name in removed:
        (folder / name).unlink()
    (folder / written).write_text("{}")
    problem = refused(folder)
    assert problem.code == code and words in problem.message


def test_weights_under_another_name_are_found_after_the_help_is_typed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    problem = refused(folder)
    assert problem.code == "model.incomplete" and "model.fp16.safetensors" in problem.message
    subprocess.run(shlex.split(str(problem.hint)), check=True)
    our_model(find_model(str(folder), say=print))


def test_shards_without_an_index_are_named(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert INDEX in refused(folder).message


def test_an_index_beside_the_whole_weights_is_left_alone(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    our_model(find_model(str(folder), say=print))


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"model__layers__0__mlp__up_proj__weight": torch.ones(48, 32, dtype=torch.int8)}, {}, "up_proj.weight has the type I8"),
        ({"model__layers__0__mlp__up_proj__weight": torch.ones(48, 4, dtype=torch.int32)}, {"quantization": {"bits": 4}}, "MLX, 4 bits"),
        (
            {
                "model__layers__0__mlp__up_proj__weight": torch.ones(48, 32).to(torch.float8_e4m3fn),
                "model__layers__0__mlp__up_proj__weight_scale_inv": torch.full((1, 1), 0.02),
            },
            {},
            "weight_scale_inv is a scale",
        ),
    ],
)
def test_quantised_weights_that_no_config_explains_are_refused(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object], words: str
) -> None:
    change(folder, **tensors)
    write_config(folder, **config)
    problem = refused(folder)
    assert problem.code == "model.unsupported" and words in problem.message and "no quantization_config" in problem.message


def test_tensors_without_a_layer_are_told_and_others_are_not(folder: Path) -> None:
    assert unused_note(our_model(folder)) is None
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert unused_note(our_model(folder)) is None, "older programs saved it, and the model computes it"
    write_config(folder, num_hidden_layers=1)
    note = unused_note(our_model(folder))
    assert note is not None and note.startswith("9 tensors of this model's files belong to no layer of it") and "model.layers.1." in note


@pytest.mark.parametrize("values", [{"dtype": "float99"}, {"hidden_size": "32"}, {"num_attention_heads": 0}])
def test_a_config_that_transformers_cannot_use_is_no_crash(folder: Path, values: dict[str, object]) -> None:
    write_config(folder, **values)
    assert refused(folder).code == "model.unreadable"


def test_a_missing_head_is_explained(folder: Path) -> None:
    write_config(folder, tie_word_embeddings=False)
    assert '"tie_word_embeddings": true' in refused(folder).message


def test_an_adapter_and_a_run_name_the_option_that_trains_them_further(tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "final"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    for folder in (adapter, adapter.parent):
        problem = refused(folder)
        assert problem.code == "model.is-an-adapter" and str(problem.hint).startswith(f"--from-adapter {adapter} instead of --model")


def test_quantised_weights_without_a_word_of_it_are_refused_before_they_are_loaded(folder: Path) -> None:
    change(folder, model__layers__0__mlp__up_proj__weight=torch.ones(48, 32, dtype=torch.int8))
    with pytest.raises(ConfigError):
        find_model(str(folder), say=print)
