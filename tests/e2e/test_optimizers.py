"""Optimizers from the command line: resumed runs end with the same bytes, plan knows their memory, and what cannot be is refused."""

from pathlib import Path

import pytest
from tests.support.projects import Project

FULL = ("--method", "full", "--set", "training.learning_rate=0.001")
KINDS = {
    "adamw_8bit": ("--set", "training.optimizer=adamw_8bit", *FULL),
    "adafactor": ("--set", "training.optimizer=adafactor", "--set", "lora.plus_ratio=4"),
    "muon": ("--set", "training.optimizer=muon", *FULL),
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_weights_and_state(project: Project, kind: str) -> None:
    words = ("chats.jsonl", "--max-steps", "4", "--set", "checkpoint.every=2 steps", "--output", "whole")
    project.type("train", *words, *KINDS[kind]).expect(0)
    project.type("train-resume", "whole/checkpoint-2", "--set", "output.dir=again").expect(0)
    ended = [files(project.folder / run / "checkpoint-4") for run in ("whole", "again")]
    assert any("optimizer" in name for name in ended[0]) and ended[0] == ended[1]


@pytest.mark.medium
def test_plan_counts_the_state_of_the_optimizer(project: Project) -> None:
    found = {}
    for kind in ("adamw", "adamw_8bit", "adafactor", "muon"):
        words = ("--method", "full", "--set", f"training.optimizer={kind}")
        found[kind] = project.type("plan", "chats.jsonl", *words, "--json").expect(0).json["step"]["memory_bytes"]["optimizer"]
    assert found["adamw"] == 2 * found["muon"] > 3 * found["adamw_8bit"] > 30 * found["adafactor"] > 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--set", "training.optimizer=muon"), "config.muon-needs-full"),
        (("--set", "training.optimizer=adafactor", "--set", "distributed.strategy=shard", *FULL), "config.optimizer-needs-whole-weights"),
    ],
)
def test_what_an_optimizer_cannot_train_is_refused(project: Project, words: tuple[str, ...], code: str) -> None:
    assert project.type("train", "chats.jsonl", "--max-steps", "1", *words).expect(2).codes == [code]
