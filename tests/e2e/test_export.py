"""`llamahome export`: what other tools load, broken exports that leave nothing behind, and the same answers afterwards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.models import save_tiny
from tests.support.projects import Project, chats, write_rows
from transformers import AutoModelForCausalLM

from llamahome.model.adapter import wrap_plain

FORMS = (("adapter", None), ("merged", "f32"), ("merged", "bf16"), ("merged", "f16"), ("gguf", "f32"), ("gguf", "q8_0"), ("ollama", "q8_0"))


@pytest.fixture(scope="module")
def trained(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("trained") / "project")
    project.type("train", "chats.jsonl", "--max-steps", "4").expect(0)
    return project


def exported(project: Project, to: str, *words: str) -> dict:
    return project.type("export", "latest", "--to", to, "--json", *words).expect(0).json


@pytest.mark.parametrize(("to", "quant"), FORMS)
def test_every_form_is_written_compared_and_named(trained: Project, to: str, quant: str | None) -> None:
    output = f"exports/{to}-{quant}"
    found = exported(trained, to, "--output", output, *(["--quant", quant] if quant else []))
    assert set(found) >= {"to", "path", "files", "max_logit_difference", "tolerance"}
    assert (found["to"], found["path"]) == (to, output)
    assert 0 <= found["max_logit_difference"] <= found["tolerance"]
    folder = trained.folder / output
    assert sorted(found["files"]) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    card = (folder / "README.md").read_text()
    assert "base_model" in card and "greatest logit difference" in card and "## Use" in card
    if to == "ollama":
        assert "FROM ./" in (folder / "Modelfile").read_text() and "<|im_end|>" in (folder / "Modelfile").read_text()
    if to == "gguf":
        assert any(name.endswith("-adapter.gguf") for name in found["files"])


def test_run_adapter_and_merged_folder_compute_the_same(trained: Project) -> None:
    final = trained.run.root / "final"
    merged = trained.folder / exported(trained, "merged", "--quant", "f32", "--output", "same-merged")["path"]
    adapter = trained.folder / exported(trained, "adapter", "--output", "same-adapter")["path"]
    base, ids = trained.folder / "data/models/base/tiny", torch.tensor([[5, 9, 200, 31, 7, 8]])

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected = logits(wrap_plain(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), final))
    assert torch.equal(logits(wrap_plain(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)), expected)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)), expected, atol=1e-4)


def test_the_export_chats_as_the_run_does(trained: Project) -> None:
    merged = exported(trained, "merged", "--quant", "f32", "--output", "chat-merged")["path"]
    ask = ("--prompt", "What is the capital of France?", "--max-new-tokens", "8")
    assert trained.type("chat", merged, *ask).expect(0).out == trained.type("chat", "latest", *ask).expect(0).out


def test_without_options_it_lies_under_the_name_of_its_run_and_is_not_written_twice(trained: Project) -> None:
    first = exported(trained, "merged")
    assert first["path"] == f"output/exports/{trained.run.paths.run_id}/merged-bf16"
    again = trained.type("export", "latest", "--to", "merged").expect(2)
    assert again.codes == ["export.exists"]


def _edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))


def _other_family(folder: Path) -> None:
    shutil.rmtree(folder)
    save_tiny(folder, "phi")


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pretokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (folder / "tokenizer.json").write_text(json.dumps(values))


BROKEN: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "edited config": (_edit_config, "merged", 2),
    "weights cut short": (_cut_weights, "merged", 2),
    "a weight that is no number": (_not_finite, "merged", 2),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "gguf", 2),
    "no tokenizer, merged": (lambda folder: (folder / "tokenizer.json").unlink(), "merged", 2),
    "half a tokenizer": (lambda folder: _cut(folder / "tokenizer.json"), "merged", 2),
    "half a chat template": (lambda folder: (folder / "chat_template.jinja").write_text("{% if"), "merged", 2),
    "a tokenizer unknown to llama.cpp": (_pretokenizer, "gguf", 2),
    "a family unknown to llama.cpp": (_other_family, "gguf", 2),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "merged", 2),
    "no config": (lambda folder: (folder / "config.json").unlink(), "merged", 2),
    "a base of all weights, as adapter": (lambda folder: None, "adapter", 2),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_and_leaves_nothing_behind(project: Project, case: str) -> None:
    spoil, to, status = BROKEN[case]
    spoil(project.folder / "data/models/base/tiny")
    answer = project.type("export", "data/models/base/tiny", "--to", to, "--output", "out")
    answer.expect(status)
    assert answer.codes
    assert not list(project.folder.glob("out*"))


@pytest.mark.slow
def test_the_python_command_of_the_card_answers_as_the_run_does(trained: Project) -> None:
    folder = trained.folder / exported(trained, "merged", "--quant", "f32", "--output", "card")["path"]
    script = re.search(r"python -c '(.*?)'\n```", (folder / "README.md").read_text(), flags=re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=240, check=True)
    expected = trained.type("chat", "latest", "--prompt", "Hello", "--max-new-tokens", "64").expect(0).out
    assert done.stdout.strip().removesuffix("<|im_end|>").strip() == expected.strip()


def test_a_checkpoint_has_a_name_of_its_own_and_the_card_names_no_path_of_this_machine(trained: Project) -> None:
    checkpoint = trained.run.root / f"checkpoint-{trained.run.checkpoints[-1]}"
    found = trained.type("export", str(checkpoint), "--to", "merged", "--json").expect(0).json
    assert found["path"] == f"output/exports/{trained.run.paths.run_id}-{checkpoint.name}/merged-bf16"
    card = (trained.folder / found["path"] / "README.md").read_text()
    assert str(trained.folder) not in card
    assert f"| steps | {trained.run.checkpoints[-1]} |" in card


@pytest.mark.medium
def test_the_card_tells_how_the_weights_were_trained_also_if_they_are_not_the_last(project: Project) -> None:
    keep = ("--set", "checkpoint.every=1 steps", "--set", "checkpoint.keep_last=9", "--set", "evaluation.every=1 steps")
    project.type("train", "chats.jsonl", "--max-steps", "3", *keep).expect(0)
    name = "adapter_model.safetensors"
    for step in (2, 3):
        shutil.copy(project.run.root / f"checkpoint-{step}/model/{name}", project.run.root / f"final/{name}")
        project.type("export", "latest", "--to", "adapter", "--output", f"out-{step}").expect(0)
        card = (project.folder / f"out-{step}/README.md").read_text()
        loss = project.run.by_step("eval/loss")
        assert f"| steps | {step} |" in card
        assert f"| held-out loss | {loss[0]:.4f} before training, {loss[step]:.4f} after it |" in card
        assert "| training | sft, lora, 4 rows a step, learning rate 0.01, cosine, adamw, seed 0 |" in card


@pytest.mark.parametrize("left", [[], ["adapter_model.safetensors"]])
def test_a_final_folder_without_a_model_is_passed_over_for_the_checkpoint(trained: Project, left: list[str]) -> None:
    broken = trained.folder / "broken"
    shutil.copytree(trained.run.root, broken)
    for path in (broken / "final").iterdir():
        if path.name not in left:
            path.unlink()
    for words in (
        ("chat", "broken", "--prompt", "a", "--max-new-tokens", "2"),
        ("export", "broken", "--to", "merged", "--output", "whole"),
    ):
        answer = trained.type(*words).expect(0)
        assert f"has a final/ without a model; its checkpoint-{trained.run.checkpoints[-1]} is used" in answer.err
    shutil.rmtree(trained.folder / "whole")
    shutil.rmtree(broken)


def test_a_model_whose_experts_change_with_the_smallest_change_is_exported_rounded(project: Project) -> None:
    base = project.folder / "data/models/base/tiny"
    shutil.rmtree(base)
    save_tiny(base, "deepseek")
    project.type("train", "chats.jsonl", "--max-steps", "2", "--output", "run").expect(0)
    answer = project.type("export", "run", "--to", "merged", "--output", "out", "--json").expect(0)
    assert "because of rounding alone" in answer.err and answer.json["max_logit_difference"] == answer.json["tolerance"]


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(trained: Project) -> None:
    bare = trained.folder / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained.run.root / "final" / name, bare / name)
    found = trained.type("export", "bare", "--to", "gguf", "--output", "bare-gguf", "--json").expect(0).json
    assert any(name.endswith("-f16.gguf") for name in found["files"])


def test_an_end_of_answers_that_a_gguf_file_has_no_place_for_is_named_and_is_a_stop_word_for_ollama(project: Project) -> None:
    base = project.folder / "data/models/base/tiny"
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 4, 5]}))
    answer = project.type("export", "tiny", "--to", "ollama", "--output", "out").expect(0)
    assert "a GGUF file names 3 tokens that end an answer, so " in answer.err
    assert (project.folder / "out/Modelfile").read_text().count("PARAMETER stop") == 4


def test_an_unknown_type_names_those_there_are_and_its_help_works(project: Project) -> None:
    answer = project.type("export", "tiny", "--to", "merged", "--quant", "q4_0", "--output", "out").expect(2)
    assert answer.codes == ["export.unknown-quant"]
    words = answer.helps[0].split()
    project.type("export", "tiny", "--to", "merged", *words, "--output", "out").expect(0)


@pytest.mark.medium
def test_a_killed_export_leaves_nothing_under_its_name_and_works_the_next_time(project: Project) -> None:
    with project.start("export", "tiny", "--to", "merged", "--output", "out") as process:
        partial = project.folder / "out.tmp"
        deadline = time.monotonic() + 120
        while not partial.exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (project.folder / "out").exists()
    project.type("export", "tiny", "--to", "merged", "--output", "out").expect(0)
    assert not partial.exists()


def test_a_read_only_folder_is_an_error_of_the_machine_or_of_saving(project: Project) -> None:
    (project.folder / "blocked").write_text("a file where a folder is wanted")
    answer = project.type("export", "tiny", "--to", "merged", "--output", "blocked/out")
    assert answer.status in (2, 4, 7) and answer.codes
    assert (project.folder / "blocked").read_text() == "a file where a folder is wanted"


def test_a_full_fine_tuned_run_is_exported_too(project: Project) -> None:
    write_rows(project.folder / "rows.jsonl", chats(24))
    project.type("train", "rows.jsonl", "--method", "full", "--max-steps", "2").expect(0)
    found = exported(project, "gguf", "--quant", "f32", "--output", "full")
    assert not any(name.endswith("-adapter.gguf") for name in found["files"])
    assert found["max_logit_difference"] < 1e-3
