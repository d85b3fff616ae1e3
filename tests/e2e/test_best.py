"""final/ from the best checkpoint: it is that checkpoint's model bit for bit, and the end of the run says which step it is."""

import re
import shutil
from pathlib import Path

import pytest
from tests.support.projects import Project

OVERSHOOTS = ("--set", "evaluation.every=1 step", "--set", "training.schedule=constant", "--set", "training.learning_rate=0.3")
BEST = ("--set", "output.final=best")
LINE = re.compile(r"final/ is step (\d+), the best of (\d+) evaluations: (\S+) ([\d.]+); the last step's was ([\d.]+)")
NEXT = re.compile(r"the best evaluation was at step (\d+) .*; final/ is step (\d+),( the last step and)? the best that is saved: loss")


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_final_is_the_best_checkpoint_bit_for_bit_and_early_stop_says_why(project: Project) -> None:
    done = project.type("train", "chats.jsonl", *OVERSHOOTS, *BEST, "--set", "evaluation.early_stop_patience=3", "--max-steps", "40")
    assert re.search(r"^no gain in 3 evaluations after \d+ steps", done.expect(0).out, re.M)
    ((step, count, name, value, last),) = LINE.findall(done.out)
    losses, root = project.run.by_step("eval/loss"), project.run.paths.root
    assert losses[int(step)] == min(losses.values()) and int(step) < max(losses)
    assert (int(count), name) == (len(losses), "loss")
    assert abs(float(value) - losses[int(step)]) < 1e-4 and abs(float(last) - losses[max(losses)]) < 1e-4
    assert weights(root / "final") == weights(root / f"checkpoint-{step}/model") != weights(root / f"checkpoint-{max(losses)}/model")


@pytest.mark.medium
def test_the_best_survives_a_resume_and_the_next_best_is_named_where_it_was_deleted(project: Project) -> None:
    project.type("train", "chats.jsonl", *OVERSHOOTS, *BEST, "--set", "evaluation.early_stop_patience=2", "--max-steps", "40").expect(0)
    losses, root = project.run.by_step("eval/loss"), project.run.paths.root
    best, last = min((loss, step) for step, loss in losses.items())[1], max(losses)
    assert best < last
    worse = ("--set", "training.learning_rate=3", "--set", "evaluation.early_stop_patience=null", "--max-steps", str(last + 1))
    again = project.type("train-resume", "latest", *worse).expect(0)
    longer = project.run.by_step("eval/loss")
    assert (
        min(longer, key=lambda step: longer[step]) == best and f"final/ is step {best}, the best of {len(longer)} evaluations" in again.out
    )
    shutil.rmtree(root / f"checkpoint-{best}")
    gone = project.type("train-resume", "latest").expect(0)
    ((named, step, _),) = NEXT.findall(gone.out)
    assert int(named) == best and weights(root / "final") == weights(root / f"checkpoint-{step}/model")


@pytest.mark.medium
def test_a_score_of_answers_decides_and_is_recorded(project: Project) -> None:
    (project.folder / "longest.py").write_text("def score(answer, reference):\n    return float(len(answer))\n", encoding="utf-8")
    words = ("--set", "evaluation.every=2 steps", "--set", "evaluation.metric=longest.py:score", "--max-steps", "6")
    done = project.type("train", "chats.jsonl", *words, *BEST).expect(0)
    scores = project.run.by_step("eval/score")
    assert set(scores) == {0, 2, 4, 6}
    best = min((-score, step) for step, score in scores.items() if step)[1]
    assert f"final/ is step {best}," in done.out
    root = project.run.paths.root
    assert weights(root / "final") == weights(root / f"checkpoint-{best}/model")


def test_what_cannot_be_the_best_is_refused(project: Project) -> None:
    unkept = project.type("train", "chats.jsonl", *BEST, "--set", "checkpoint.keep_best=0").expect(2)
    assert unkept.codes == ["config.best-not-kept"]
    unknown = project.type("train", "chats.jsonl", "--set", "evaluation.metric=exactt").expect(2)
    assert unknown.codes == ["evaluation.unknown-metric"] and unknown.helps == ["--set evaluation.metric=exact"]
