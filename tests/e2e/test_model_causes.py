"""Errors of model folders name the cause, and their help lines work as typed."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.experts import tiny_experts
from tests.support.projects import Answer, Project
from tests.support.tokenizers import save_tokenizer

QUICK = ("--max-steps", "1", "--set", "evaluation.sample_prompts=0")


def one_problem(answer: Answer, status: int, code: str) -> str:
    """The help line of the only problem, empty without one."""
    answer.expect(status)
    assert answer.codes == [code], answer.err
    assert "Traceback" not in answer.err
    return answer.helps[0] if answer.helps else ""


@pytest.mark.medium
@pytest.mark.parametrize("verb", ["chat", "train-eval", "train-resume"])
def test_the_help_for_a_moved_base_fixes_every_command(project: Project, verb: str) -> None:
    bases = project.folder / "data/models/base"
    shutil.copytree(bases / "tiny", project.folder / "first/base")
    project.type("train", "chats.jsonl", "--model", "first/base", "--output", "o", *QUICK, "--set", "checkpoint.every=1 steps").expect(0)
    (project.folder / "first/base").rename(project.folder / "first/moved")
    shutil.rmtree(bases / "tiny")
    words = {
        "chat": ("chat", "o", "--prompt", "Hello", "--max-new-tokens", "2"),
        "train-eval": ("train-eval", "o", "chats.jsonl"),
        "train-resume": ("train-resume", "o", "--max-steps", "2"),
    }[verb]
    answer = project.type(*words)
    help_line = one_problem(answer, 2, "model.base-gone")
    assert "first/base" in answer.err and "--model" not in answer.err
    if verb == "train-resume":  # nothing tells which of several bases it was
        assert help_line == "--set model.name=FOLDER, the folder where the base is now"
        help_line = "--set model.name=first/moved"
    project.type(*words, *shlex.split(help_line)).expect(0)


def test_every_command_names_a_weight_that_is_not_finite(project: Project) -> None:
    weights = project.folder / "data/models/base/tiny/model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    for words in (("train", "chats.jsonl", "--model", "tiny"), ("train-eval", "tiny", "chats.jsonl"), ("chat", "tiny", "--prompt", "x")):
        answer = project.type(*words)
        assert one_problem(answer, 2, "model.not-finite") == ""
        assert "model.layers.1.self_attn.o_proj.weight, 1 of 1,024 values NaN, in model.safetensors" in answer.err


@pytest.mark.medium
def test_a_run_on_experts_lists_its_adapters_and_resumes_bit_for_bit(project: Project) -> None:
    folder = project.folder / "experts"
    tiny_experts("qwen3-moe", vocab_size=320, max_position_embeddings=512).save_pretrained(folder)
    save_tokenizer(folder, vocabulary=320)
    words = ("train", "chats.jsonl", "--model", "experts", *QUICK[2:], "--set", "checkpoint.every=1 steps", "--max-steps")
    first = project.type(*words, "2", "--output", "plain").expect(0)
    assert "adapters on 8 layers of 4 kinds: q_proj 2, k_proj 2, v_proj 2, o_proj 2;" in first.err
    setting = re.search(r"the fused experts learn too with (--set '.*?')", first.err)
    assert setting and "mlp.gate (router)" in first.err
    named = shlex.split(setting[1])
    whole = project.type(*words, "2", "--output", "whole", *named).expect(0)
    assert "experts.gate_up_proj 2, experts.down_proj 2" in whole.err and "fused experts learn too" not in whole.err
    project.type("train-resume", "whole/checkpoint-1", "--output", "again").expect(0)
    one, other = (load_file(project.folder / name / "final/adapter_model.safetensors") for name in ("whole", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((project.folder / "whole/final/adapter_config.json").read_text())["target_parameters"]
    project.type("chat", "whole", "--prompt", "Hello", "--max-new-tokens", "2").expect(0)
    refused = project.type(*words, "2", "--output", "dropped", *named, "--set", "lora.dropout=0.1")
    help_line = one_problem(refused, 2, "lora.not-plain")
    project.type(*words, "2", "--output", "dropped", *named, "--set", "lora.dropout=0.1", *shlex.split(help_line)).expect(0)


def test_the_help_for_an_lfs_pointer_is_the_command_that_fetches_it(project: Project) -> None:
    (project.folder / ".git").mkdir()
    tiny: Path = project.folder / "data/models/base/tiny"
    (tiny / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    answer = project.type("train", "chats.jsonl", "--model", "tiny")
    assert one_problem(answer, 2, "model.lfs-pointer") == "git -C data/models/base/tiny lfs pull"
