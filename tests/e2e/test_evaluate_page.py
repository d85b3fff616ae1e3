"""The commands of docs/Evaluate.md are typed as they stand, but those that need lm-eval (test_lm_eval.py)."""

import re
import shlex

import pytest
from tests.e2e.test_readme import commands_of
from tests.support.projects import ROOT, Project, chats, write_rows

from llamahome.training.scores import BUILT_IN

PAGE = ROOT / "docs/Evaluate.md"
TEXT = PAGE.read_text(encoding="utf-8")
TYPED = [text for text in commands_of(PAGE) if "--tasks" not in text]


def test_every_metric_and_ending_is_explained() -> None:
    assert all(f"| `{name}` |" in TEXT for name in BUILT_IN) and len(TYPED) >= 5


@pytest.mark.slow
def test_the_commands_of_the_page_work(project: Project) -> None:
    write_rows(project.folder / "data/eval/test.jsonl", chats(5, seed=9))
    function = re.search(r"^    def score.*\n(?:        .*\n)+", TEXT, flags=re.MULTILINE)[0]
    (project.folder / "mine.py").write_text("\n".join(line[4:] for line in function.splitlines()))
    project.type("train", "chats.jsonl", "--max-steps", "1").expect(0)
    for text in TYPED:
        answer = project.type(*shlex.split(text)[1:], "--max-new-tokens", "4").expect(0)
        assert "loss" in answer.out and ("base" in answer.out) == ("none" not in text)
    assert (project.folder / "answers.md").is_file()
