"""`plan` refuses what `train` refuses before it trains, with the same words, as far as that is known without the weights."""

from collections.abc import Callable
from typing import Any

import pytest
from tests.e2e.test_help_of_commands import FAULTS
from tests.e2e.test_learning import DISTILL, GRPO, REFUSED, reward
from tests.support.projects import Answer, Project, chats, write_rows


def _prompts(project: Project) -> None:
    reward(project)
    write_rows(project.folder / "rows.jsonl", [{"prompt": row["messages"][0]["content"]} for row in chats(24)])


NOT_KNOWN = {
    "lora.no-initial-values": "which rows suffice is known after passes through the base",
    "lora.not-loadable": "a plan for such a model is refused for another reason",
    "output.not-a-folder": "a plan writes nothing, and has no --output",
    "no number": "what a reward returns is known when answers are drawn",
}
MORE: dict[str, tuple[tuple[str, ...], Callable[[Project], Any]]] = {
    "no folder of the teacher": (DISTILL, lambda project: None),
    "no such function": ((*GRPO[:-1], "mine.py:other"), reward),
    "a metric that is not there": ((*DISTILL[:2], "--set", "evaluation.metric=mine.py:score"), lambda project: None),
    "answers of prompts": (("train", "rows.jsonl", *GRPO[2:]), _prompts),
}
CASES: dict[str, tuple[tuple[str, ...], Callable[[Project], Any]]] = {
    **{
        f"{fault.code} {number}": (fault.words, lambda project, fault=fault: fault.prepare(project.folder))
        for number, fault in enumerate(FAULTS)
        if fault.words[0] == "train" and not fault.slow and fault.code not in NOT_KNOWN
    },
    **{name: (words, prepare) for name, (words, prepare, *_) in REFUSED.items() if words[0] == "train" and name not in NOT_KNOWN},
    **MORE,
}


def refusal(answer: Answer) -> str:
    """The error blocks."""
    return answer.err[answer.err.index("error[") :]


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_refused_as_the_run_is(project: Project, name: str) -> None:
    words, prepare = CASES[name]
    prepare(project)
    planned, trained = project.type("plan", *words[1:]), project.type(*words)
    assert refusal(planned) == refusal(trained) and planned.status == trained.status


def test_a_plan_warns_of_settings_as_the_run_does(project: Project) -> None:
    words = ("chats.jsonl", "--max-steps", "1", "--method", "full", "--set", "lora.rank=4", "--set", "evaluation.sample_prompts=0")
    planned, trained = project.type("plan", *words), project.type("train", *words)
    warnings = [[line for line in answer.err.splitlines() if line.startswith("warning: ")] for answer in (planned, trained)]
    assert "warning: lora.rank 4 has no effect: training.method is full; remove lora.rank from --set" in warnings[0] == warnings[1]
