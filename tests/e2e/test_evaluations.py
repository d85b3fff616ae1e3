"""All evaluations of a run take about a tenth of its time: on a part of the held-out rows, the same before, after and when it goes on."""

import pytest
from tests.support.projects import Project, chats, write_rows

FEW = ("chats.jsonl", "--set", "data.eval_split=40", "--max-steps", "3")
SAID = "evaluation: 16 of 40 held-out rows, chosen by content, no fewer, although evaluating takes "


@pytest.fixture
def many(project: Project) -> Project:
    write_rows(project.folder / "chats.jsonl", chats(120))
    return project


def held_out_losses(project: Project) -> dict[int, float]:
    return project.run.by_step("eval/loss")


@pytest.mark.medium
@pytest.mark.parametrize("data", ["prepared", "streamed", "a file of its own"])
def test_a_short_run_evaluates_the_fewest_rows_and_says_so(many: Project, data: str) -> None:
    words = FEW
    if data == "streamed":
        words = (*FEW, "--set", "data.streaming=true")
    if data == "a file of its own":
        write_rows(many.folder / "other.jsonl", chats(40, seed=3))
        words = ("chats.jsonl", "--set", "data.eval_split=auto", "--max-steps", "3", "--eval-data", "other.jsonl")
    answer = many.type("train", *words).expect(0)
    assert answer.err.count(SAID) == 1 and "--set evaluation.rows=all evaluates all" in answer.err
    config = (many.run.root / "config.yaml").read_text()
    assert "  rows: 16" in config and '  every: "3 steps"' in config
    few = held_out_losses(many)
    assert list(few) == [0, 3]
    whole = many.type("train", *words, "--set", "evaluation.rows=all").expect(0)
    assert "evaluation: " not in whole.err
    assert held_out_losses(many).keys() == few.keys() and held_out_losses(many)[0] != few[0]


@pytest.mark.medium
def test_a_run_that_goes_on_evaluates_the_rows_that_it_began_with(many: Project) -> None:
    many.type("train", *FEW).expect(0)
    straight = held_out_losses(many)
    stopped = many.type("train", *FEW, at=[("llamahome.training.loop:train_step", 2, ["SIGINT"])]).expect(75)
    resumed = many.type(*stopped.helps[0].split()[1:]).expect(0)
    assert held_out_losses(many) == straight and SAID not in resumed.err
    longer = many.type("train-resume", "latest", "--max-steps", "60").expect(0)
    assert "  rows: 16" in (many.run.root / "config.yaml").read_text() and SAID not in longer.err
