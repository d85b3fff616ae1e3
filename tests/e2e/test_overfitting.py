"""A run that over-fits says so at its end, and what it then names is better than what it saved last."""

import re

import pytest
from tests.support.projects import Project

WORDS = ("--set", "data.eval_split=10", "--set", "evaluation.every=10 steps", "--set", "training.learning_rate=0.02")
LINE = re.compile(
    r"^over-fitted: the held-out loss rose ([\d.]+)% since step (\d+), more than its noise; train with (\S+ \S+), or use (\S+)$", re.M
)


@pytest.mark.medium
def test_what_is_named_where_a_run_over_fits_is_better(project: Project) -> None:
    done = project.type("train", "chats.jsonl", *WORDS, "--epochs", "40").expect(0)
    losses = project.run.by_step("eval/loss")
    ((share, step, shorter, folder),) = LINE.findall(done.out)
    assert losses[int(step)] == min(losses.values())
    assert abs(losses[max(losses)] / losses[int(step)] - 1 - float(share) / 100) < 1e-3
    assert project.type("train-eval", folder, "chats.jsonl", "--json").expect(0).json["eval/loss"] > 0, "it can be used as typed"
    again = project.type("train", "chats.jsonl", *WORDS, *shorter.split()).expect(0)
    after = project.run.by_step("eval/loss")
    assert after[max(after)] < losses[max(losses)] and not LINE.search(again.out)


def test_a_run_that_does_not_says_nothing(project: Project) -> None:
    done = project.type("train", "chats.jsonl", *WORDS).expect(0)
    assert "held-out loss" in done.out and "over-fitted" not in done.out
