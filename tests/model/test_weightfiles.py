"""The errors for damaged model files and for weights that are not finite name file and cause."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.support.models import our_model, plain_model, save_tiny

from llamahome.errors import ConfigError, Problem
from llamahome.model.load import find_model
from llamahome.model.weightfiles import check_finite, check_weight_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 269060552\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def folder(tmp_path: Path, llama: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copied"))


def problem_of(folder: Path) -> Problem:
    with pytest.raises(ConfigError) as error:
        find_model(str(folder), say=lambda _: None)
    (problem,) = error.value.problems
    return problem


def sharded(folder: Path) -> list[Path]:
    """Split the weights of `folder` into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for name, weights in parts.items():
        save_file({weight: tensors[weight] for weight in weights}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {weight: name for name, weights in parts.items() for weight in weights}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in parts]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_lfs_pointer_is_reported_with_the_fetch_command_only_inside_a_clone(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    alone = problem_of(folder)
    assert (alone.code, alone.where, alone.hint) == ("model.lfs-pointer", str(folder / name), None) and "git-lfs" in alone.message
    (folder / ".git").mkdir()
    assert problem_of(folder).hint == f"git -C {folder} lfs pull"


@given(share=st.floats(0, 0.999))
@settings(max_examples=25, deadline=None)
def test_a_weight_file_cut_anywhere_is_reported_as_cut_short_or_empty(
    llama: Path, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    shutil.copyfile(llama / "config.json", folder / "config.json")
    whole = (llama / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    problem = problem_of(folder)
    assert problem.code == "model.unreadable" and problem.where == str(folder / "model.safetensors") and problem.hint is None
    assert "cut short" in problem.message or "empty" in problem.message


def test_a_file_in_another_format_is_reported_as_no_safetensors_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b"not JSON!" + bytes(100))
    assert "no safetensors file" in problem_of(folder).message


@pytest.mark.parametrize(
    ("written", "words"), [('{"eos_token_id": 2,', "not valid JSON"), ("[]", "no JSON object"), ("", "empty"), (POINTER, "LFS")]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_broken_config_is_refused_and_not_replaced(folder: Path, name: str, written: str, words: str) -> None:
    (folder / name).write_text(written)
    problem = problem_of(folder)
    assert problem.where == str(folder / name) and words in problem.message


def test_only_files_listed_in_the_index_are_required(folder: Path) -> None:
    first, second = sharded(folder)
    (folder / "consolidated.safetensors").write_bytes(b"")
    check_weight_files(folder)
    our_model(folder)
    second.unlink()
    problem = problem_of(folder)
    assert problem.code == "model.incomplete" and second.name in problem.message and first.name not in problem.message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_single_value_that_is_not_finite_is_found_anywhere(folder: Path, name: str, value: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = float(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError) as error:
        our_model(folder)
    (problem,) = error.value.problems
    kind = "NaN" if value == "nan" else "infinite"
    count = f"{name}, 1 of {weights[name].numel():,} values {kind}, in model.safetensors"
    assert problem.code == "model.not-finite" and count in problem.message and problem.where == str(folder)


def test_large_finite_values_are_accepted() -> None:
    model = plain_model("llama")
    model.model.norm.weight.data.fill_(3e38)
    assert not model.model.norm.weight.sum().isfinite()
    check_finite(model, Path("nowhere"))
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ConfigError, match=r"model\.norm\.weight, 1 of 32 values NaN"):
        check_finite(model, Path("nowhere"))
