"""VeRA as a user trains, resumes, distributes, chains, plans and exports it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.e2e.test_lora_init import TRAIN, files
from tests.support.models import save_tiny
from tests.support.projects import Project

VERA = ("--set", "lora.use_vera=true", "--set", "lora.rank=24", "--set", "training.learning_rate=0.02")


@pytest.fixture(scope="module")
def trained(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the run `whole`."""
    project = make_project(tmp_path_factory.mktemp("vera") / "project")
    project.type("train", *TRAIN, *VERA, "--output", "whole").expect(0)
    return project


def loss(project: Project, model: str) -> float:
    return project.type("train-eval", model, "chats.jsonl", "--base", "none", "--json").expect(0).json["loss"]


@pytest.mark.medium
def test_a_resumed_run_ends_with_the_same_bytes(trained: Project) -> None:
    trained.type("train-resume", "whole/checkpoint-2", "--set", "output.dir=again").expect(0)
    ended = [files(trained.folder / run / "checkpoint-4") for run in ("whole", "again")]
    assert any("adapter" in name for name in ended[0]) and ended[0] == ended[1]


@pytest.mark.slow  # measured: 22 s on a busy machine
@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_two_processes_train_as_one(trained: Project, strategy: str) -> None:
    words = ("--world-size", "2", "--set", f"distributed.strategy={strategy}", "--output", strategy)
    trained.shell("train-distributed", *TRAIN, *VERA, *words).expect(0)
    one, two = (load_file(trained.folder / run / "final/adapter_model.safetensors") for run in ("whole", strategy))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (two[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.medium
def test_the_saved_adapter_is_pefts_and_every_command_takes_it(trained: Project) -> None:
    settings = json.loads((trained.folder / "whole/final/adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["save_projection"]) == ("VERA", 24, True)
    assert {"base_model.vera_A", "base_model.vera_B"} < set(load_file(trained.folder / "whole/final/adapter_model.safetensors"))
    trained.type("export", "whole", "--to", "merged", "--quant", "f32", "--output", "merged").expect(0)
    own = loss(trained, "whole")
    assert own == pytest.approx(loss(trained, "merged"), rel=1e-4) and own < loss(trained, "tiny") - 0.01
    trained.type("export", "whole", "--to", "adapter", "--output", "adapter").expect(0)
    assert loss(trained, "adapter") == pytest.approx(own, rel=1e-5)
    assert trained.type("chat", "whole", "--prompt", "Hello", "--max-new-tokens", "3").expect(0).out


@pytest.mark.medium
def test_it_is_trained_further_with_its_own_matrices(trained: Project) -> None:
    answer = trained.type("train", *TRAIN, "--from-adapter", "whole", "--set", "training.seed=7", "--output", "further").expect(0)
    assert "lora.rank 16 -> 24" in answer.err and "lora.use_vera false -> true" in answer.err
    one, two = (load_file(trained.folder / run / "final/adapter_model.safetensors") for run in ("whole", "further"))
    assert one.keys() == two.keys()
    same = {name for name in one if (one[name] == two[name]).all()}
    assert same == {"base_model.vera_A", "base_model.vera_B"}


def test_what_it_excludes_is_refused_with_the_adapter_too(trained: Project) -> None:
    refused = trained.type("train", *TRAIN, "--from-adapter", "whole", "--set", "lora.plus_ratio=4").expect(2)
    assert refused.codes == ["config.lora-vera"]
    path = trained.folder / "other/adapter_config.json"
    shutil.copytree(trained.folder / "whole/final", path.parent)
    path.write_text(json.dumps({**json.loads(path.read_text()), "save_projection": False}))
    refused = trained.type("train", *TRAIN, "--from-adapter", "other").expect(2)
    assert refused.codes == ["model.not-trainable-adapter"] and "save_projection=True" in refused.err


@pytest.mark.medium
def test_a_base_in_4_bits_is_trained(trained: Project) -> None:
    save_tiny(trained.folder / "data/models/base/wide", hidden_size=64, intermediate_size=128, head_dim=16)
    words = (*TRAIN, *VERA, "--model", "wide", "--set", "model.quantization=nf4")
    trained.type("train", *words, "--output", "packed").expect(0)
    evaluations = trained.type("runs", "show", "packed", "--json").expect(0).json["evaluations"]
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]


def test_the_setting_without_effect_is_said(trained: Project) -> None:
    answer = trained.type("train", *TRAIN, *VERA, "--set", "lora.alpha=8", "--output", "alpha").expect(0)
    assert "lora.alpha 8 has no effect: with lora.use_vera trained vectors are the scale" in answer.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("lora.use_dora=true", "config.lora-vera", "--set lora.use_dora=false"),
        ("lora.use_rslora=true", "config.lora-vera", "--set lora.use_rslora=false"),
        ("lora.init=pissa", "config.lora-vera", "--set lora.init=default"),
        ("lora.plus_ratio=4", "config.lora-vera", "--set lora.plus_ratio=1"),
        ("lora.rank_pattern={q_proj: 2}", "config.lora-vera", "--set lora.rank_pattern={}"),
        ("lora.alpha_pattern={q_proj: 2}", "config.lora-vera", "--set lora.alpha_pattern={}"),
        ("model.new_tokens=[<x>]", "config.lora-vera", "--set model.new_tokens=[]"),
        ("model.resize_embeddings=true", "config.lora-vera", "--set model.resize_embeddings=false"),
        ("lora.modules_to_save=[lm_head]", "lora.not-vera", "--set lora.modules_to_save=[]"),
    ],
)
def test_what_it_excludes_is_refused_in_one_line(trained: Project, words: str, code: str, said: str) -> None:
    refused = trained.type("train", *TRAIN, *VERA, "--set", words).expect(2)
    assert refused.codes == [code] and said in refused.err
    (option,) = (found.strip("'") for found in re.findall(r"--set ('[^']+'|[^\s,]+)", said))
    trained.type("train", *TRAIN[:1], "--max-steps", "1", *VERA, "--set", words, "--set", option, "--output", f"mended-{option}").expect(0)
