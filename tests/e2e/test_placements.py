"""A run goes on from its checkpoint on another number of processes and in another placement, as if nothing had happened."""

import math

import pytest
from tests.support.projects import Project
from transformers import AutoModelForCausalLM

FULL = ("training.method=full", "training.schedule=constant", "training.warmup=0", "training.learning_rate=0.001")


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_placement(project: Project) -> None:
    words = [word for setting in FULL for word in ("--set", setting)]
    project.type("train", "chats.jsonl", "--max-steps", "5", *words).expect(0)
    straight = project.run.by_step("train/loss")
    sharded = project.shell("train", "chats.jsonl", "--max-steps", "2", *words, "--world-size", "2", "--set", "distributed.strategy=shard")
    assert "shard: as set" in sharded.expect(0).err
    for steps, processes, strategy in ((3, 3, "replicate"), (4, 2, "shard"), (5, 1, "auto")):
        settings = (f"training.max_steps={steps}", f"distributed.world_size={processes}", f"distributed.strategy={strategy}")
        project.shell("train-resume", "latest", *(word for setting in settings for word in ("--set", setting))).expect(0)
    found = project.run.by_step("train/loss")
    assert found.keys() == straight.keys()
    assert all(math.isclose(found[step], loss, rel_tol=1e-5) for step, loss in straight.items())
    parts = [len(list((project.run.root / f"checkpoint-{step}/model").glob("*.safetensors"))) for step in project.run.checkpoints]
    assert parts[-1] == 1 and list(project.run.weights()) == ["model.safetensors"]
    AutoModelForCausalLM.from_pretrained(project.run.root / "final")
