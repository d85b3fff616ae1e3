"""An adapter whose base has moved names the base, and the folder that is it now when there is one and only one."""

import shutil
from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, our_model, save_tiny

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError, Problem
from llamahome.model.adapter import find_base, open_trained, save_model
from llamahome.model.lora import add_lora


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of tmp_path/bases/here, in tmp_path/mine."""
    base = save_tiny(tmp_path / "bases/here", "llama")
    model = add_lora(our_model(base), LoraConfig(rank=2, target_modules=["q_proj"]), base=str(base), seed=0, lean=True)
    save_model(model, tmp_path / "mine", base=base)
    return tmp_path / "mine"


def problem_of(adapter: Path) -> Problem:
    with pytest.raises(ConfigError) as error:
        find_base(adapter, say=lambda _: None)
    (problem,) = error.value.problems
    return problem


def test_the_one_folder_that_fits_is_named_and_works(adapter: Path, tmp_path: Path) -> None:
    recorded, moved = tmp_path / "bases/here", tmp_path / "bases/there"
    recorded.rename(moved)
    save_tiny(tmp_path / "bases/wider", "llama", hidden_size=64)
    problem = problem_of(adapter)
    assert problem.code == "model.base-gone" and str(recorded) in problem.message and "adapter_config.json" in (problem.where or "")
    assert problem.hint == f"--set model.name={moved}"
    assert open_trained(adapter, dtype=torch.float32, device=CPU, say=lambda _: None, base=str(moved))


def test_of_two_that_fit_none_is_guessed(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "bases/here").rename(tmp_path / "bases/one")
    shutil.copytree(tmp_path / "bases/one", tmp_path / "bases/two")
    assert problem_of(adapter).hint == "--set model.name=FOLDER, its new place"


def test_a_base_that_is_there_is_used_unless_another_is_typed(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "bases/here", tmp_path / "bases/copy")
    assert find_base(adapter, say=lambda _: None) == tmp_path / "bases/here"
    assert find_base(adapter, typed=str(tmp_path / "bases/copy"), say=lambda _: None) == tmp_path / "bases/copy"
