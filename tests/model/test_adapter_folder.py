"""Where the base of an adapter is looked for, and what is said if it is gone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, our_model, save_tiny

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError, Problem
from llamahome.model.adapter import open_trained, save_model
from llamahome.model.adapter_folder import find_base
from llamahome.model.lora import add_lora


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter in tmp_path/mine, trained on tmp_path/bases/here."""
    base = save_tiny(tmp_path / "bases/here", "llama")
    model = add_lora(our_model(base), LoraConfig(rank=2, target_modules=["q_proj"]), base=str(base), seed=0, lean=True)
    save_model(model, tmp_path / "mine", base=base)
    return tmp_path / "mine"


def problem_of(adapter: Path) -> Problem:
    with pytest.raises(ConfigError) as error:
        find_base(adapter, say=lambda _: None)
    (problem,) = error.value.problems
    return problem


def test_the_only_fitting_folder_is_named_and_works(adapter: Path, tmp_path: Path) -> None:
    recorded, moved = tmp_path / "bases/here", tmp_path / "bases/there"
    recorded.rename(moved)
    save_tiny(tmp_path / "bases/wider", "llama", hidden_size=64)
    problem = problem_of(adapter)
    assert problem.code == "model.base-gone" and str(recorded) in problem.message and "adapter_config.json" in (problem.where or "")
    assert problem.hint == f"--set model.name={moved}"
    assert open_trained(adapter, dtype=torch.float32, device=CPU, say=lambda _: None, base=str(moved))


@pytest.mark.parametrize("recorded", ["bases/here", "here", "/before/it/moved/data/models/base/here"])
def test_a_base_in_the_project_of_the_adapter_is_found_from_another_folder(
    adapter: Path, tmp_path: Path, recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / ("bases/here" if recorded == "bases/here" else "data/models/base/here")
    if not base.exists():
        base.parent.parent.mkdir(parents=True)
        (tmp_path / "bases").rename(base.parent)
    save_tiny(tmp_path / "mine" / base.relative_to(tmp_path), "llama", hidden_size=64)  # nearer, and of other sizes
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": recorded}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    lines: list[str] = []
    assert find_base(adapter, say=lines.append) == base and str(base) in lines[-1]
    base.rename(tmp_path / "gone")
    assert problem_of(adapter).code == "model.base-gone"


def test_none_of_two_fitting_folders_is_named(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "bases/here").rename(tmp_path / "bases/one")
    shutil.copytree(tmp_path / "bases/one", tmp_path / "bases/two")
    assert problem_of(adapter).hint == "--set model.name=FOLDER, the folder where the base is now"


def test_an_existing_base_is_used_unless_another_is_given(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "bases/here", tmp_path / "bases/copy")
    assert find_base(adapter, say=lambda _: None) == tmp_path / "bases/here"
    assert find_base(adapter, typed=str(tmp_path / "bases/copy"), say=lambda _: None) == tmp_path / "bases/copy"
