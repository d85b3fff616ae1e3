"""A streamed base: every kind of run beside it, stopped and resumed, and what is done with the run, are as beside a base in memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.models import save_tiny
from tests.support.projects import Answer, Project, RunFiles, labelled, pairs, write_rows

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="finds mapped files in /proc")
MODEL = ("--model", "deep", "--set", "training.micro_batch_tokens=2048", "--set", "checkpoint.async=false")
EVALUATED = ("train", "chats.jsonl", *MODEL, "--max-steps", "2", "--set", "evaluation.every=2 steps")
SHORT = ("--max-new-tokens", "6")
SAID = "of it are read twice"
COUNTS = "def score(answer, reference, row):\n    return answer.count('e')\n"
OBJECTIVE = {
    "dpo": ("pairs.jsonl",),
    "orpo": ("pairs.jsonl",),
    "kto": ("labels.jsonl",),
    "distill": ("chats.jsonl", "--set", "distill.teacher=taught"),
    "grpo": ("chats.jsonl", "--reward", "mine.py:score", "--set", "grpo.max_new_tokens=5", "--set", "grpo.group_size=3"),
}
KINDS = {
    "answers": ("chats.jsonl",),
    "recomputed": ("chats.jsonl", "--set", "training.gradient_checkpointing=true"),
    "nf4": ("chats.jsonl", "--set", "model.quantization=nf4"),
    "int8": ("chats.jsonl", "--set", "model.quantization=int8"),
    "pissa": ("chats.jsonl", "--set", "lora.init=pissa", "--set", "lora.rank=4"),
    "eva": ("chats.jsonl", "--set", "lora.init=eva", "--set", "lora.rank=4"),
    "dora": ("chats.jsonl", "--set", "lora.use_dora=true"),
    "vera": ("chats.jsonl", "--set", "lora.use_vera=true"),
    "whole": ("chats.jsonl", "--set", "lora.modules_to_save=[lm_head]"),
    "tokens": ("chats.jsonl", "--set", "model.new_tokens=[<one>,<two>]"),
    **{name: (*words, "--set", f"training.objective={name}") for name, words in OBJECTIVE.items()},
}
QUICK = ("answers", "nf4", "dpo", "grpo")
"""The others are marked slow."""


def fill(project: Project) -> Project:
    """With the base `deep`, a teacher's words, a reward and rows of every kind."""
    save_tiny(project.folder / "data/models/base/deep", hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=5)
    write_rows(project.folder / "pairs.jsonl", pairs(24))
    write_rows(project.folder / "labels.jsonl", labelled(24))
    (project.folder / "mine.py").write_text(COUNTS, encoding="utf-8")
    return project


@pytest.fixture
def deep(project: Project) -> Project:
    return fill(project)


@pytest.fixture(scope="module")
def trained(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the run `one`, whose base was streamed."""
    project = fill(make_project(tmp_path_factory.mktemp("streamed") / "project"))
    assert SAID in project.type("train", "chats.jsonl", *MODEL, "--output", "one", STREAMED="1").expect(0).err
    return project


def weights(project: Project, run: str) -> dict[str, bytes]:
    return RunFiles(project.folder, project.folder / run).weights()


@pytest.mark.medium
@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_a_stopped_and_resumed_run_ends_as_one_in_memory(deep: Project, kind: str) -> None:
    words = ("train", *KINDS[kind], *MODEL, "--max-steps", "3")
    if kind == "distill":
        deep.type("data", "teach", "chats.jsonl", "--teacher", "deep", "--output", "taught", "--top-k", "5", STREAMED="1").expect(0)
    held = deep.type(*words, "--output", "held").expect(0)
    assert SAID not in held.err
    stopped = deep.type(*words, "--output", "run", at=[("llamahome.training.loop:train_step", 2, ["SIGTERM"])], STREAMED="1").expect(75)
    assert SAID in stopped.err
    assert SAID in deep.type("train-resume", "run", STREAMED="1").expect(0).err
    assert weights(deep, "run") == weights(deep, "held")


@pytest.mark.medium
@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_bit_for_bit_where_memory_is_larger_or_smaller(deep: Project, first: bool) -> None:
    """Also with the size of passes that the run has chosen itself."""
    words = ("train", "chats.jsonl", "--model", "deep", "--max-steps", "4")
    straight, there, then = ({"STREAMED": "1"} if streams else {} for streams in (first, first, not first))
    assert (SAID in deep.type(*words, "--output", "straight", **straight).expect(0).err) == first
    deep.type(*words, "--output", "run", at=[("llamahome.training.loop:train_step", 3, ["SIGTERM"])], **there).expect(75)
    assert (SAID in deep.type("train-resume", "run", **then).expect(0).err) != first
    assert weights(deep, "run") == weights(deep, "straight")


@pytest.mark.medium
def test_an_adapter_is_trained_further_beside_a_streamed_base(trained: Project) -> None:
    further = ("train", "chats.jsonl", "--from-adapter", "one", "--max-steps", "2", *MODEL)
    trained.type(*further, "--output", "held").expect(0)
    assert SAID in trained.type(*further, "--output", "streamed", STREAMED="1").expect(0).err
    assert weights(trained, "streamed") == weights(trained, "held")


@pytest.mark.slow
def test_evaluations_and_answers_are_those_of_a_base_in_memory(deep: Project) -> None:
    words, found = (*EVALUATED, "--set", "evaluation.metric=exact", "--set", "evaluation.sample_prompts=2"), []
    for name, variables in (("held", {}), ("streamed", {"STREAMED": "1"})):
        answer = deep.type(*words, "--output", name, **variables).expect(0)
        run = RunFiles(deep.folder, deep.folder / name)
        found.append((run.by_step("eval/loss"), run.by_step("eval/exact"), [each["answer"] for each in run.lines("samples")]))
    assert found[0] == found[1] and len(found[0][2]) == 4 and SAID in answer.err


def test_sample_answers_are_left_out_unless_they_are_asked_for(deep: Project) -> None:
    (deep.folder / ".config/training_config.yaml").write_text(settings_without_samples(deep), encoding="utf-8")
    silent = deep.type(*EVALUATED, "--output", "silent", STREAMED="1").expect(0)
    run = RunFiles(deep.folder, deep.folder / "silent")
    assert "evaluations show no sample answers" in silent.err and len(run.by_step("eval/loss")) == 2
    assert not (deep.folder / run.paths.metrics_dir / "samples.jsonl").exists()


def settings_without_samples(project: Project) -> str:
    """The settings of the project, which leave evaluation.sample_prompts as it is."""
    text = (project.folder / ".config/training_config.yaml").read_text(encoding="utf-8")
    return text.replace("evaluation:\n  sample_prompts: 0\n", "")


def both(project: Project, *words: str) -> tuple[Answer, Answer]:
    """What a command comes to with the base in memory, and streamed."""
    return project.type(*words).expect(0), project.type(*words, STREAMED="1").expect(0)


@pytest.mark.medium
def test_the_finished_run_is_measured_and_answers_beside_a_streamed_base(trained: Project) -> None:
    """Also with its adapter switched off, for the base."""
    held, streamed = both(trained, "train-eval", "one", "chats.jsonl", "--metric", "exact", *SHORT, "--rows", "6", "--json")
    assert "each token of an answer reads" in streamed.err and "each token" not in held.err
    assert {**held.json, "answers": None} == {**streamed.json, "answers": None}
    held, streamed = both(trained, "chat", "one", "--prompt", "hello", *SHORT)
    assert "each token of an answer reads" in streamed.err and held.out == streamed.out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "whole", "nf4"])
def test_rows_and_modules_of_an_adapter_stay_beside_a_streamed_base(deep: Project, kind: str) -> None:
    """They are in memory, and what is streamed is not written to."""
    deep.type("train", *KINDS[kind], *MODEL, "--max-steps", "2", "--output", "one").expect(0)
    held, streamed = both(deep, "train-eval", "one", "chats.jsonl", "--base", "none", "--json")
    assert "each token of an answer reads" in streamed.err and held.json == streamed.json


@pytest.mark.medium
def test_a_plan_says_what_a_run_says(trained: Project) -> None:
    plan = trained.type("plan", "chats.jsonl", *MODEL, "--json", STREAMED="1").expect(0).json
    assert plan["refusal"] is None and any(SAID in line for line in plan["streamed"])


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_finished_run_is_exported_and_compared_layer_by_layer(trained: Project, form: str) -> None:
    found, quant = [], ("--quant", "f32")
    for name, variables in (("held", {}), ("streamed", {"STREAMED": "1"})):
        answer = trained.type("export", "one", "--to", form, *quant, "--output", f"{name}-{form}", "--json", **variables).expect(0)
        found.append(json.loads(answer.out)["max_logit_difference"])
    held, streamed = (
        {path.name: path.read_bytes() for path in (trained.folder / f"{name}-{form}").glob("*.safetensors")}
        for name in ("held", "streamed")
    )
    assert held == streamed and held
    assert found[1] == pytest.approx(found[0], abs=1e-3)
