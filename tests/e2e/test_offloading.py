"""A run whose inputs of layers wait in a file learns what any run learns, stops and resumes as any run, and says what it does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.models import save_tiny
from tests.support.projects import Project, Strike, labelled, pairs, write_rows

MODEL = ("--model", "deep", "--set", "checkpoint.every=2 steps")
LONG = ("chats.jsonl", "--epochs", "1.6", *MODEL)
CHECKPOINTED, OFFLOADED = ("--set", "training.gradient_checkpointing=true"), ("--set", "training.activation_offloading=true")
KINDS = {
    "lora": ("chats.jsonl", "--set", "lora.dropout=0.2"),
    "full": ("chats.jsonl", "--method", "full", "--set", "training.learning_rate=0.001"),
    "nf4": ("chats.jsonl", "--set", "model.quantization=nf4"),
    "dpo": ("pairs.jsonl", "--set", "training.objective=dpo"),
    "kto": ("labels.jsonl", "--set", "training.objective=kto"),
}
SAID = "activation offloading on: inputs of layers"


@pytest.fixture(scope="module")
def deep(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("offloading") / "project")
    save_tiny(project.folder / "data/models/base/deep", hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=5)
    write_rows(project.folder / "pairs.jsonl", pairs(24))
    write_rows(project.folder / "labels.jsonl", labelled(24))
    return project


@pytest.mark.medium
@pytest.mark.parametrize("kind", [name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in KINDS])
def test_what_is_learned_is_the_same_bit_for_bit(deep: Project, kind: str) -> None:
    learned = []
    for way in (CHECKPOINTED, OFFLOADED):
        done = deep.type("train", *KINDS[kind], *MODEL, "--max-steps", "3", *way).expect(0)
        assert (SAID in done.err) == (way is OFFLOADED)
        learned.append((deep.run.weights(), deep.run.by_step("train/loss"), deep.run.by_step("train/grad_norm")))
    assert learned[0] == learned[1] and len(learned[0][1]) == 3


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(deep: Project) -> None:
    deep.type("train", *LONG, *OFFLOADED).expect(0)
    expected = deep.run.weights(), deep.run.by_step("train/loss")
    strike: list[Strike] = [("llamahome.training.loop:train_step", 3, ["SIGINT"])]
    deep.type("train", *LONG, *OFFLOADED, at=strike).expect(75)
    resumed = deep.type("train-resume", "latest").expect(0)
    assert SAID in resumed.err
    assert deep.run.weights() == expected[0]
    assert deep.run.by_step("train/loss") == expected[1]


def test_a_disk_that_is_memory_is_said_to_be_no_place(deep: Project) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or "tmpfs /dev/shm" not in Path("/proc/mounts").read_text(encoding="utf-8").replace("shm /dev", "tmpfs /dev"):
        pytest.skip("needs a file system in memory")
    done = deep.type("train", "chats.jsonl", *MODEL, "--max-steps", "1", *OFFLOADED, TMPDIR=str(memory)).expect(0)
    assert "activation offloading off: /dev/shm is in memory itself" in done.err and SAID not in done.err


def test_it_contradicts_checkpointing_that_is_off(deep: Project) -> None:
    words = ("--set", "training.gradient_checkpointing=false", *OFFLOADED)
    refused = deep.type("train", "chats.jsonl", *MODEL, *words).expect(2)
    assert refused.codes == ["config.offload-needs-checkpointing"] and refused.helps == ["--set training.gradient_checkpointing=true"]


@pytest.mark.medium
def test_the_plan_says_what_it_takes_and_what_fits(deep: Project) -> None:
    plans = {}
    for way in (CHECKPOINTED, OFFLOADED):
        plans[way] = json.loads(deep.type("plan", "chats.jsonl", *MODEL, *way, "--json").expect(0).out)
    off, on = (plans[way]["step"] for way in (CHECKPOINTED, OFFLOADED))
    assert (off["activation_offloading"], on["activation_offloading"]) == (False, True)
    assert on["gradient_checkpointing"] and on["memory_bytes"]["activations"] < off["memory_bytes"]["activations"]
    longest = {way: (plan["longest_row_tokens"], plan["longest_row_tokens_otherwise"]) for way, plan in plans.items()}
    assert longest[OFFLOADED] == pytest.approx(longest[CHECKPOINTED], rel=0.3), "auto may offload, too; other work changes what is free"
    text = deep.type("plan", "chats.jsonl", *MODEL, *OFFLOADED).expect(0).out
    with_it, without = longest[OFFLOADED]
    assert "gradient checkpointing on, activation offloading on" in text
    assert "tokens fit" in text and "without activation offloading" in text
    assert with_it > 1.05 * without > 0, "the inputs of two of five layers are spared"
