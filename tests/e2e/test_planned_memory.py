"""The memory that a run records as planned is what `plan` says of it, and planning it changes nothing of the training."""

import json
from typing import Any

import pytest
from tests.support.projects import Project

SETTINGS = ("--set", "training.micro_batch_tokens=2048", "--set", "training.gradient_checkpointing=false")


def planned(project: Project) -> dict[str, int] | None:
    metrics = project.folder / project.run.paths.metrics_dir
    found: dict[str, int] | None = json.loads((metrics / "summary.json").read_text())["planned_memory"]
    return found


@pytest.mark.medium
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_parts_are_those_of_the_plan_and_hold_for_the_run(project: Project, method: str) -> None:
    words = ("chats.jsonl", "--method", method, *SETTINGS)
    expected: dict[str, Any] = project.type("plan", *words, "--json").expect(0).json["step"]["memory_bytes"]
    project.type("train", *words).expect(0)
    found = planned(project)
    beside = found.pop("beside")
    assert found == {part: size for part, size in expected.items() if part != "total"}
    peak = max(project.run.by_step("memory/peak").values())
    assert beside > 100 << 20 and peak < beside + sum(found.values()) + (128 << 20)


@pytest.mark.medium
def test_a_resumed_run_records_it_again_and_takes_the_same_course(project: Project) -> None:
    words = ("chats.jsonl", "--max-steps", "4", "--set", "checkpoint.every=2 steps", *SETTINGS)
    project.type("train", *words).expect(0)
    first, losses = planned(project), project.run.by_step("train/loss")
    checkpoint = project.run.root / "checkpoint-2"
    project.type("train-resume", str(checkpoint)).expect(0)
    again = planned(project)
    assert {**again, "beside": 0} == {**first, "beside": 0}
    assert project.run.by_step("train/loss") == losses


def test_a_plan_that_fails_is_said_and_the_run_trains(project: Project) -> None:
    answer = project.type("train", "chats.jsonl", at=[("llamahome.planning.run_memory:memory_of", 1, ["EIO"])]).expect(0)
    assert "the planned memory is not recorded: OSError" in answer.err and planned(project) is None
