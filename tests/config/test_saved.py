"""The settings of a run, read again: for the run itself with their origins, and for another one as what was chosen and what was not."""

from pathlib import Path
from typing import get_args

import pytest

from llamahome.config.check import check_config, config_warnings
from llamahome.config.load import dump_config, is_chosen, load_config, read_saved_config, with_values
from llamahome.config.objectives import ObjectiveName
from llamahome.config.schema import Config


def test_a_saved_configuration_keeps_where_its_values_came_from(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config(assignments=["training.seed=3"], environment={}, folder=tmp_path)))
    origins = read_saved_config(path).origins
    assert origins["training.seed"] == "saved: --set"
    assert origins["training.epochs"] == "saved: default"
    assert is_chosen(origins["training.seed"]) and not is_chosen(origins["training.epochs"])


@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_what_nobody_chose_in_a_run_is_not_chosen_where_its_settings_are_used_again(tmp_path, objective):
    words = [f"training.objective={objective}", "training.seed=3", "grpo.reward=mine.py:score", "distill.teacher=taught"]
    loaded = load_config(assignments=words[: {"grpo": 3, "distill": 4}.get(objective, 2)], environment={}, folder=tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(loaded))
    again = load_config([path], environment={}, folder=tmp_path)
    assert again.config == loaded.config
    assert {key: is_chosen(origin) for key, origin in again.origins.items()} == {
        key: is_chosen(loaded.origins[key]) for key in again.origins
    }
    assert again.origins["training.seed"].startswith(f"{path}:")
    assert check_config(again.config, again.origins) == check_config(loaded.config, loaded.origins) == []
    assert len(config_warnings(again.config, again.origins)) == len(config_warnings(loaded.config, loaded.origins))


def test_what_a_run_left_to_auto_is_auto_again_in_another_one_unless_it_is_edited(tmp_path):
    loaded = load_config(assignments=["training.objective=dpo", "training.epochs=2"], environment={}, folder=tmp_path)
    values = {"training.learning_rate": 0.0073, "evaluation.every": "4 steps", "data.max_length": 512}
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(with_values(loaded, values, origin="auto: lora at hidden size 64")))
    assert read_saved_config(path).config.training.learning_rate == 0.0073, "the run itself goes on with its numbers"
    assert read_saved_config(path).origins["training.learning_rate"] == "saved: auto: lora at hidden size 64"
    assert load_config([path], environment={}, folder=tmp_path).config == loaded.config
    text = path.read_text().replace("rate: 0.0073  #", "rate: 0.001  #").replace("format: preference  #", "format: text  #")
    path.write_text(text)
    edited = load_config([path], environment={}, folder=tmp_path)
    assert (edited.config.training.learning_rate, edited.config.data.format) == (0.001, "text")
    assert all(edited.origins[key].startswith(f"{path}:") for key in ("training.learning_rate", "data.format"))
    assert read_saved_config(path).origins["training.learning_rate"].startswith(f"{path}:")


def test_a_value_that_looks_like_a_comment_keeps_its_origin(tmp_path):
    loaded = load_config(environment={}, folder=tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(with_values(loaded, {"model.name": "  # "}, origin="auto: probed")))
    assert load_config([path], environment={}, folder=tmp_path).config == loaded.config
    assert read_saved_config(path).origins["model.name"] == "saved: auto: probed"


def test_settings_of_an_earlier_version_that_were_auto_are_auto_again(tmp_path):
    path = tmp_path / "config.yaml"
    text = dump_config(load_config(environment={}, folder=tmp_path))
    path.write_text(text.replace("learning_rate: auto  # default", "learning_rate: 0.0073  # auto: lora at hidden size 64"))
    assert load_config([path], environment={}, folder=tmp_path).config == Config()
    assert read_saved_config(path).config.training.learning_rate == 0.0073


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint-2/config.yaml"])
def test_the_folder_of_a_run_is_not_that_of_another_one_with_its_settings(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs/mine" / name
    path.parent.mkdir(parents=True)
    loaded = load_config(assignments=["output.dir=runs/mine", "output.name=mine"], environment={}, folder=tmp_path)
    path.write_text(dump_config(loaded))
    assert load_config([path], environment={}, folder=tmp_path).config.output.dir is None
    path.write_text(dump_config(loaded).replace("dir: runs/mine", "dir: runs/other"))
    assert load_config([path], environment={}, folder=tmp_path).config.output.dir == "runs/other"


def test_values_of_a_file_whose_name_begins_with_auto_are_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("auto.yaml")
    path.write_text("lora: {rank: 8}\n")
    assert is_chosen(load_config([path], environment={}, folder=tmp_path).origins["lora.rank"])


def test_a_value_edited_in_a_saved_configuration_is_not_called_a_default(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config(environment={}, folder=tmp_path)).replace("  seed: 0  #", "  seed: 9  #"))
    origins = read_saved_config(path).origins
    assert origins["training.seed"].startswith(f"{path}:")


def test_a_saved_configuration_is_read_without_other_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMAHOME_TRAINING__SEED", "5")
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config/training_config.yaml").write_text("training: {seed: 4, epochs: 9}\n")
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  seed: 3\n")
    assert read_saved_config(path).config == Config.model_validate({"training": {"seed": 3}})
