"""A run goes on from its checkpoint on another number of processes and in another placement, as if nothing had happened."""

import math

import pytest
import safetensors.torch
import torch
from tests.e2e.test_processes import side_by_side
from tests.support.projects import Project
from transformers import AutoModelForCausalLM

CONSTANT = ("training.schedule=constant", "training.warmup=0", "training.learning_rate=0.001")
FULL = ("training.method=full", *CONSTANT)


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


def resumed_as(steps: int, processes: int, strategy: str) -> list[str]:
    settings = (f"training.max_steps={steps}", f"distributed.world_size={processes}", f"distributed.strategy={strategy}")
    return ["train-resume", "latest", *(word for setting in settings for word in ("--set", setting))]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_one_two_four_and_one_process_end_with_the_weights_of_one(project: Project, method: str) -> None:
    kind = ("lora.use_dora=true",) if method == "dora" else (f"training.method={method}",)
    words = [word for setting in (*kind, *CONSTANT) for word in ("--set", setting)]
    project.type("train", "chats.jsonl", "--max-steps", "5", *words).expect(0)
    straight, expected = project.run.by_step("train/loss"), flat(project.run.weights())
    project.type("train", "chats.jsonl", "--max-steps", "1", *words).expect(0)
    project.shell(*resumed_as(2, 2, "replicate")).expect(0)
    project.shell(*resumed_as(3, 2, "shard")).expect(0)
    ended = side_by_side(project, *[resumed_as(4, 4, "hybrid")] * 4)
    assert [status for status, _ in ended] == [0] * 4, ended
    assert "hybrid: as set" in ended[0][1], "two machines of two processes each"
    project.shell(*resumed_as(5, 1, "auto")).expect(0)
    found = project.run.by_step("train/loss")
    assert found.keys() == straight.keys()
    assert all(math.isclose(found[step], loss, rel_tol=1e-5) for step, loss in straight.items())
    weights = flat(project.run.weights())
    assert (weights - expected).norm() <= 1e-4 * expected.norm()


def flat(files: dict[str, bytes]) -> torch.Tensor:
    """All weights end to end, by name."""
    (content,) = files.values()
    tensors = safetensors.torch.load(content)
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])
