"""`training.mixed_precision: fp16` on a processor: near float32, its scale is in the checkpoint, and only plain torch computes it."""

import json
from pathlib import Path

import pytest
from tests.support.projects import Project

HALF = ("--set", "training.mixed_precision=fp16", "--set", "model.backend=reference")
TRAIN = ("train", "chats.jsonl", "--max-steps", "4", "--set", "checkpoint.every=2 steps")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.slow  # processors compute float16 slowly: 50 s on a busy machine
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_in_float16_is_near_one_in_float32_and_resumes_bit_for_bit(project: Project, method: str) -> None:
    words = (*TRAIN, "--method", method, "--set", "training.learning_rate=0.001")
    said = project.type(*words, *HALF, "--output", "half").expect(0).err
    assert "reference back end, fp16 products: as set" in said
    project.type("train-resume", "half/checkpoint-2", "--set", "output.dir=again").expect(0)
    ended = [files(project.folder / run / "checkpoint-4") for run in ("half", "again")]
    assert ended[0] and ended[0] == ended[1]
    states = [json.loads((project.folder / run / "checkpoint-4/trainer_state.json").read_text())["extra"] for run in ("half", "again")]
    assert states[0]["loss_scale"] == states[1]["loss_scale"] and states[0]["loss_scale"]["good_steps"] > 0
    project.type(*words, "--set", "training.mixed_precision=no", "--output", "exact").expect(0)
    half, exact = (project.type("runs", "show", run, "--json").expect(0).json["evaluations"][-1]["eval/loss"] for run in ("half", "exact"))
    assert half == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--set", "training.mixed_precision=fp16"), "training.no-such-precision"),
        ((*HALF, "--set", "model.dtype=bfloat16"), "config.two-precisions"),
        (("--set", "model.dtype=float16"), "config.two-precisions"),
    ],
)
def test_what_cannot_be_is_refused(project: Project, words: tuple[str, ...], code: str) -> None:
    refused = project.type(*TRAIN, *words)
    assert refused.codes == [code] and refused.status in (2, 4)
