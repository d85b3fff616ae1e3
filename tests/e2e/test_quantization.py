"""`model.quantization`: a run beside a base in few bits, and what is done with it afterwards, as a user types it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.models import save_tiny
from tests.support.projects import Project, RunFiles

from llamahome.model.export.verify import load_plain

NF4 = ("--model", "wide", "--set", "model.quantization=nf4")
WIDER = ("--model", "wider")
TRAIN = ("train", "chats.jsonl", *NF4, "--set", "checkpoint.every=2 steps")


def quantized(project: Project) -> list[Path]:
    return sorted(project.folder.glob("data/models/quantized/wide-*"))


@pytest.fixture(scope="module")
def trained(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the run `one` beside the base `wide` in nf4."""
    project = make_project(tmp_path_factory.mktemp("quantized") / "project")
    save_tiny(project.folder / "data/models/base/wide", hidden_size=64, intermediate_size=128, head_dim=16)
    said = project.type(*TRAIN, "--output", "one").expect(0).err
    assert re.search(r"nf4: \d+ linear layers of the decoder, 0\.\d M parameters, and \d that .* at 0\.\d+ bytes each; .* over all", said)
    return project


@pytest.mark.medium
def test_the_adapter_names_the_base_itself_and_the_copy_is_used_again(trained: Project) -> None:
    config = json.loads((trained.folder / "one/final/adapter_config.json").read_text())
    assert config["base_model_name_or_path"].endswith("data/models/base/wide")
    (folder,) = quantized(trained)
    assert folder.name.startswith("wide-nf4-")
    answer = trained.type(*TRAIN, "--output", "again").expect(0)
    assert "is quantised once" not in answer.err and quantized(trained) == [folder]


@pytest.mark.medium
def test_a_killed_run_goes_on_bit_for_bit(trained: Project) -> None:
    strike = ("llamahome.training.loop:train_step", 4, ["SIGKILL"])
    trained.type(*TRAIN, "--output", "killed", "--set", "checkpoint.async=false", at=[strike])
    trained.type("train-resume", "killed").expect(0)
    straight, resumed = (RunFiles(trained.folder, trained.folder / run) for run in ("one", "killed"))
    assert resumed.weights() == straight.weights()


@pytest.fixture(scope="module")
def wider(trained: Project) -> Project:
    """The same project with the run `straight` beside a base of which some layers are in 8 bits."""
    folder = trained.folder / "data/models/base/wider"
    save_tiny(folder, hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4, num_key_value_heads=1)
    load_plain(folder).bfloat16().save_pretrained(folder)
    said = trained.type(*TRAIN, *WIDER, "--output", "straight").expect(0).err
    assert re.search(r"and \d that lose most by it, 0\.\d M, in 8 bits, at 0\.6[012]\d bytes each", said)
    return trained


def layers_in_8_bits(project: Project) -> list[str]:
    (copy,) = project.folder.glob("data/models/quantized/wider-*")
    return [
        name for name in json.loads((copy / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] if "layers" in name
    ]


@pytest.mark.medium
def test_a_killed_run_beside_layers_in_8_bits_goes_on_bit_for_bit(wider: Project) -> None:
    strike = ("llamahome.training.loop:train_step", 4, ["SIGKILL"])
    wider.type(*TRAIN, *WIDER, "--output", "struck", "--set", "checkpoint.async=false", at=[strike])
    wider.type("train-resume", "struck").expect(0)
    straight, resumed = (RunFiles(wider.folder, wider.folder / run) for run in ("straight", "struck"))
    assert resumed.weights() == straight.weights()


def test_the_merged_export_adds_to_layers_in_8_bits_what_was_learned(wider: Project) -> None:
    wider.type("export", "straight", "--to", "merged", "--quant", "f32", "--output", "wider-merged").expect(0)
    merged, adapter = (
        load_file(wider.folder / name) for name in ("wider-merged/model.safetensors", "straight/final/adapter_model.safetensors")
    )
    (copy,) = wider.folder.glob("data/models/quantized/wider-*")
    base = load_file(copy / "model.safetensors")
    assert layers_in_8_bits(wider)
    for name in layers_in_8_bits(wider):
        a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"].float() + 2.0 * b @ a)


def test_loftq_makes_good_the_error_of_layers_in_4_and_8_bits(wider: Project) -> None:
    wider.type(
        *TRAIN, *WIDER, "--output", "loftq", "--max-steps", "1", "--set", "lora.init=loftq", "--set", "training.learning_rate=1e-9"
    ).expect(0)
    adapter = load_file(wider.folder / "loftq/final/adapter_model.safetensors")
    assert layers_in_8_bits(wider) and all(value.abs().max() > 1e-5 for name, value in adapter.items() if "lora_B" in name)


@pytest.mark.medium
def test_it_is_measured_beside_the_quantised_base_and_on_request_beside_the_base(trained: Project) -> None:
    (last,) = [each for each in trained.type("runs", "show", "one", "--json").expect(0).json["evaluations"] if each["step"] == 5]
    beside = ("train-eval", "one", "chats.jsonl", "--base", "none", "--json")
    answer = trained.type(*beside).expect(0)
    assert "trained beside the base in nf4" in answer.err and last["eval/loss"] > 0
    other = trained.type(*beside, "--set", "model.quantization=null").expect(0)
    assert answer.json["loss"] != other.json["loss"] and answer.json["loss"] == pytest.approx(other.json["loss"], rel=0.2)
    assert "trained beside the base in nf4" in trained.type("chat", "one", "--prompt", "hello").expect(0).err


def test_the_merged_export_holds_the_numbers_that_the_weights_stand_for(trained: Project) -> None:
    trained.type("export", "one", "--to", "merged", "--quant", "f32", "--output", "merged").expect(0)
    config = json.loads((trained.folder / "merged/config.json").read_text())
    assert "quantization_config" not in config
    merged, adapter = (load_file(trained.folder / name) for name in ("merged/model.safetensors", "one/final/adapter_model.safetensors"))
    (copy,) = quantized(trained)
    from llamahome.model.export.quantized import open_weights

    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    expected = open_weights(copy).read(f"{name}.weight") + 2.0 * b @ a  # alpha 32 over rank 16
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    measured = [trained.type("train-eval", model, "chats.jsonl", "--base", "none", "--json").expect(0).json for model in ("one", "merged")]
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], rel=1e-4)


@pytest.mark.medium
def test_an_adapter_is_trained_further_beside_the_numbers_that_it_learned_beside(trained: Project) -> None:
    further = ("train", "chats.jsonl", "--from-adapter", "one", "--max-steps", "1")
    answer = trained.type(*further, "--output", "further").expect(0)
    assert "model.quantization null -> nf4" in answer.err and len(quantized(trained)) == 1
    first, last = (RunFiles(trained.folder, trained.folder / name).by_step("eval/loss") for name in ("further", "one"))
    assert first[0] == pytest.approx(last[max(last)], abs=1e-4)
    beside_base = trained.type(*further, "--output", "wider", "--set", "model.quantization=null").expect(0)
    assert "model.quantization" not in beside_base.err


def test_a_plan_says_what_quantising_takes_before_there_is_a_copy(project: Project) -> None:
    save_tiny(project.folder / "data/models/base/wide", hidden_size=64, intermediate_size=128, head_dim=16)
    words = ("--model", "wide", "--set", "model.quantization=int8")
    told = project.type("plan", "chats.jsonl", *words).expect(0).err
    assert "before training it is written once, into data/models/quantized/wide-int8-" in told
    project.type("train", "chats.jsonl", "--max-steps", "1", *words).expect(0)
    assert "before training" not in project.type("plan", "chats.jsonl", *words).expect(0).err


def test_a_plan_counts_the_packed_weights(trained: Project) -> None:
    plain, packed = (
        trained.type("plan", "chats.jsonl", "--model", "wide", "--set", f"model.quantization={kind}", "--json").expect(0).json
        for kind in ("null", "nf4")
    )
    assert packed["step"]["memory_bytes"]["weights"] < 0.6 * plain["step"]["memory_bytes"]["weights"]


TARGET = ("--set", "lora.target_modules=[q_proj]")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--method", "full"), "config.quantized-full", "training.method full trains them"),
        (("--set", "distributed.strategy=shard"), "config.quantized-sharded", "whole on every process"),
        (("--model", "COPY"), "model.quantized-twice", "quantised already"),
        ((*TARGET, "--set", "lora.modules_to_save=[down_proj]"), "lora.whole-quantized", "frozen in few bits"),
        (("--model", "tiny"), "model.nothing-to-quantize", "multiple of 64"),
    ],
)
def test_what_cannot_be_is_refused_with_what_mends_it(trained: Project, words: tuple[str, ...], code: str, said: str) -> None:
    (copy,) = quantized(trained)
    words = tuple(str(copy) if word == "COPY" else word for word in words)
    answer = trained.type(*TRAIN, *words, "--output", "refused").expect(2)
    assert answer.codes == [code] and said in answer.err and len(answer.helps) == 1
    assert not (trained.folder / "refused").exists()
    assert trained.type("plan", *TRAIN[1:], *words).expect(2).codes == [code]


def test_a_base_that_is_quantised_already_is_trained_as_it_is(trained: Project) -> None:
    (copy,) = quantized(trained)
    (mended,) = trained.type(*TRAIN, "--model", str(copy), "--output", "refused").expect(2).helps
    trained.type(*TRAIN, "--model", str(copy), *mended.split(), "--output", "as-it-is").expect(0)
    first, same = (RunFiles(trained.folder, trained.folder / run).by_step("train/loss") for run in ("one", "as-it-is"))
    assert first == same


@pytest.mark.slow
def test_two_processes_train_as_one(trained: Project) -> None:
    trained.shell(*TRAIN, "--output", "pair", "--world-size", "2").expect(0)
    one, pair = (RunFiles(trained.folder, trained.folder / run).by_step("train/loss") for run in ("one", "pair"))
    assert pair == pytest.approx(one, rel=1e-5)


@pytest.mark.medium
def test_a_whole_model_is_measured_and_exported_in_few_bits_if_that_is_typed(trained: Project) -> None:
    typed = ("--set", "model.quantization=nf4")
    whole, packed = (trained.type("train-eval", "wide", "chats.jsonl", *words, "--json").expect(0) for words in ((), typed))
    assert packed.json["loss"] != whole.json["loss"] and "the base is computed from data/models/quantized/wide-nf4" in packed.err
    trained.type("export", "wide", "--to", "merged", "--quant", "f32", *typed, "--output", "in-nf4").expect(0)
    again = trained.type("train-eval", "in-nf4", "chats.jsonl", "--json").expect(0).json
    assert again["loss"] == pytest.approx(packed.json["loss"], abs=2e-3), "the numbers of the copy"
    assert trained.type("chat", "wide", "--prompt", "Hello", *typed).expect(0).err.count("the base is computed from") == 1
    assert trained.type("chat", str(quantized(trained)[0]), "--prompt", "Hello", *typed).expect(2).codes == ["model.quantized-twice"]


@pytest.mark.medium
def test_an_adapter_that_is_exported_alone_says_beside_which_base_it_was_compared(trained: Project) -> None:
    said = trained.type("export", "one", "--to", "adapter", "--output", "alone").expect(0).err
    told = "compared beside the base in bitsandbytes, nf4 with double quantisation; what loads it takes wide as it is"
    assert told in said and "--to merged" in said and told in (trained.folder / "alone/README.md").read_text()
    other = trained.type("export", "one", "--to", "adapter", "--set", "model.quantization=null", "--output", "alone-16").expect(0).err
    assert "compared beside the base" not in other


@pytest.mark.medium
def test_a_damaged_copy_is_named_as_one_and_made_again_once_it_is_removed(trained: Project) -> None:
    (copy,) = quantized(trained)
    weights, whole = copy / "model.safetensors", (copy / "model.safetensors").read_bytes()
    for damage in (lambda: weights.write_bytes(whole[:-100]), weights.unlink, (copy / "config.json").unlink):
        damage()
        for words in (("chat", "one", "--prompt", "Hello"), ("plan", "chats.jsonl", *NF4), (*TRAIN, "--output", "never")):
            answer = trained.type(*words).expect(2)
            assert answer.helps == [f"rm -r data/models/quantized/{copy.name}"], answer.err
            assert "is a copy of data/models/base/wide, which is made again if it is removed" in answer.err
    shutil.rmtree(copy)
    assert "is quantised once" in trained.type("chat", "one", "--prompt", "Hello").expect(0).err
    assert weights.read_bytes() == whole


def test_the_parameters_of_a_quantised_model_are_those_that_its_codes_stand_for(trained: Project) -> None:
    base = trained.type("models", "info", "wide", "--json").expect(0).json
    packed = trained.type("models", "info", str(quantized(trained)[0]), "--json").expect(0).json
    assert packed["parameters"] == base["parameters"] and "quantization" not in base
    assert packed["quantization"] == "bitsandbytes, nf4 with double quantisation"
