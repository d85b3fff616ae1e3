"""Adapters that begin with parts of the base, as a user trains, resumes, distributes and exports them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.support.models import save_tiny
from tests.support.projects import Project

PISSA = ("--set", "lora.init=pissa", "--set", "lora.rank=4", "--set", "lora.alpha=4")
TRAIN = ("chats.jsonl", "--max-steps", "4", "--set", "checkpoint.every=2 steps")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def trained(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the run `whole`, which began with pissa."""
    project = make_project(tmp_path_factory.mktemp("started") / "project")
    project.type("train", *TRAIN, *PISSA, "--output", "whole").expect(0)
    return project


@pytest.mark.medium
def test_a_resumed_run_ends_with_the_same_bytes(trained: Project) -> None:
    trained.type("train-resume", "whole/checkpoint-2", "--set", "output.dir=again").expect(0)
    ended = [files(trained.folder / run / "checkpoint-4") for run in ("whole", "again")]
    assert any("adapter" in name for name in ended[0]) and ended[0] == ended[1]


@pytest.mark.slow  # measured: 22 s on a busy machine
def test_two_processes_train_as_one(trained: Project) -> None:
    trained.shell("train-distributed", *TRAIN, *PISSA, "--world-size", "2", "--output", "two").expect(0)
    one, two = (load_file(trained.folder / run / "final/adapter_model.safetensors") for run in ("whole", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (two[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.medium
def test_the_adapter_is_a_plain_one_of_twice_the_rank_for_every_command(trained: Project) -> None:
    settings = json.loads((trained.folder / "whole/final/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 8, True)
    trained.type("export", "whole", "--to", "merged", "--quant", "f32", "--output", "merged").expect(0)
    losses = [trained.type("train-eval", model, "chats.jsonl", "--base", "none", "--json").expect(0).json for model in ("whole", "merged")]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-4)
    (last,) = [each for each in trained.type("runs", "show", "whole", "--json").expect(0).json["evaluations"] if each["step"] == 4]
    (first,) = [each for each in trained.type("runs", "show", "whole", "--json").expect(0).json["evaluations"] if each["step"] == 0]
    base = trained.type("train-eval", "tiny", "chats.jsonl", "--json").expect(0).json
    assert last["eval/loss"] < first["eval/loss"] and losses[0]["loss"] < base["loss"]
    answer = trained.type("train", *TRAIN, "--from-adapter", "whole", "--set", "lora.init=olora", "--output", "further").expect(0)
    assert "lora.rank 16 -> 8" in answer.err and "lora.init olora has no effect" in answer.err


@pytest.mark.medium
def test_loftq_brings_a_base_in_4_bits_nearer_to_itself(trained: Project) -> None:
    save_tiny(trained.folder / "data/models/base/wide", hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.1)
    words = ("chats.jsonl", "--model", "wide", "--max-steps", "1", "--set", "model.quantization=nf4", "--set", "lora.rank=32")
    losses = [trained.type("train-eval", "wide", "chats.jsonl", "--json").expect(0).json["loss"]]
    for init in ("loftq", "default"):
        trained.type("train", *words, "--set", f"lora.init={init}", "--set", "training.learning_rate=1e-9", "--output", init).expect(0)
        losses.append(trained.type("train-eval", init, "chats.jsonl", "--base", "none", "--json").expect(0).json["loss"])
    assert abs(losses[1] - losses[0]) < 0.5 * abs(losses[2] - losses[0])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--set", "lora.init=pissa", "--set", "model.quantization=nf4"), "config.lora-init", "--set lora.init=loftq"),
        (("--set", "lora.init=orthogonal", "--set", "lora.rank=7"), "config.lora-init", "--set lora.rank=8"),
        (("--set", "lora.init=loftq"), "config.lora-init", "--set model.quantization=nf4"),
        (("--set", "lora.init=olora", "--set", "lora.use_dora=true"), "config.lora-init", "--set lora.use_dora=false"),
        (("--set", "lora.init=eva", "--set", "lora.rank_pattern={q_proj: 2}"), "config.lora-init", "rank_pattern={}"),
        (("--set", "lora.init=eva", "--set", "lora.rank=400"), "lora.no-initial-values", "a smaller lora.rank"),
        (("--set", "lora.init=pissa", "--set", "lora.rank=17"), "lora.no-initial-values", "--set lora.rank=16"),
    ],
)
def test_what_cannot_begin_so_is_refused(trained: Project, words: tuple[str, ...], code: str, said: str) -> None:
    refused = trained.type("train", *TRAIN, *words).expect(2)
    assert refused.codes == [code] and said in refused.err


@pytest.mark.medium
def test_rows_decide_ranks_with_eva_and_a_resumed_run_keeps_them(trained: Project) -> None:
    words = (*TRAIN, "--set", "lora.init=eva", "--set", "lora.rank=4", "--set", "data.eval_split=8")
    said = trained.type("train", *words, "--output", "eva").expect(0).err
    assert "decide the ranks" in said
    trained.type("train-resume", "eva/checkpoint-2", "--set", "output.dir=eva-again").expect(0)
    ended = [files(trained.folder / run / "checkpoint-4") for run in ("eva", "eva-again")]
    assert any("adapter" in name for name in ended[0]) and ended[0] == ended[1]
    assert len(set(json.loads((trained.folder / "eva/final/adapter_config.json").read_text())["rank_pattern"].values())) > 1
    losses = [trained.type("train-eval", model, "chats.jsonl", "--base", "none", "--json").expect(0).json for model in ("eva", "tiny")]
    assert losses[0]["loss"] < losses[1]["loss"]
