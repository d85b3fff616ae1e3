"""Runs over pairs of answers, as a user types them: what they learn, how they resume, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.test_resume import Course, after_step
from tests.support.projects import Project, pairs, write_rows

DPO = ("pairs.jsonl", "--set", "training.objective=dpo", "--max-steps", "4", "--set", "checkpoint.every=2 steps")
SHORT = ("pairs.jsonl", "--max-steps", "3", "--set", "evaluation.every=1000 steps")


@pytest.fixture
def paired(project: Project) -> Project:
    write_rows(project.folder / "pairs.jsonl", pairs(20))
    return project


@pytest.mark.medium
def test_a_run_over_pairs_learns_which_answer_is_better(paired: Project) -> None:
    answer = paired.type("train", *DPO, "--max-steps", "12").expect(0)
    measured = [line for line in paired.run.lines("metrics") if "train/pair_accuracy" in line]
    assert measured[0]["train/loss"] == pytest.approx(0.693147, abs=1e-4), "the model is its own reference before the first update"
    assert measured[0]["train/reward_margin"] == pytest.approx(0, abs=1e-4)
    assert measured[-1]["train/loss"] < 0.5 and measured[-1]["train/pair_accuracy"] > measured[0]["train/pair_accuracy"]
    assert measured[-1]["train/chosen_logprob"] > measured[-1]["train/rejected_logprob"]
    held_out = [line for line in paired.run.lines("metrics") if "eval/pair_accuracy" in line]
    assert held_out[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5) and held_out[-1]["eval/loss"] < 0.6
    assert "perplexity" not in answer.out and "pair accuracy" in answer.out and "train-eval" not in answer.out


@pytest.mark.parametrize("objective", ["ipo", "orpo", "simpo"])
def test_the_other_objectives_train(paired: Project, objective: str) -> None:
    answer = paired.type("train", *SHORT, "--set", f"training.objective={objective}").expect(0)
    assert len(paired.run.by_step("train/reward_margin")) == 3
    assert ("log-probabilities" in answer.err) is (objective == "ipo")


@pytest.mark.medium
def test_a_stopped_run_over_pairs_ends_as_if_it_had_not_been(
    project: Project, make_project: Callable[[Path], Project], tmp_path: Path
) -> None:
    courses = []
    for folder in (project, make_project(tmp_path / "other")):
        write_rows(folder.folder / "pairs.jsonl", pairs(20))
        if courses:
            folder.type("train", *DPO, at=after_step(2, "SIGINT")).expect(75)
            resumed = folder.type("train-resume", "latest").expect(0)
            assert "training answers are those of an earlier run" in resumed.err
        else:
            folder.type("train", *DPO).expect(0)
        courses.append((Course.of(folder.run), folder.run.by_step("train/reward_margin")))
    assert courses[0] == courses[1]


@pytest.mark.medium
def test_a_second_run_over_the_same_pairs_reads_the_reference_and_learns_the_same(paired: Project) -> None:
    first = paired.type("train", *SHORT, "--set", "training.objective=dpo").expect(0)
    assert "log-probabilities of 32 training answers computed" in first.err
    weights = paired.run.weights()
    second = paired.type("train", *SHORT, "--set", "training.objective=dpo").expect(0)
    assert "computed" not in second.err and paired.run.weights() == weights


@pytest.mark.medium
def test_a_resumed_run_whose_reference_was_deleted_computes_it_from_the_base(paired: Project) -> None:
    paired.type("train", *DPO, at=after_step(2, "SIGINT")).expect(75)
    files = {path: path.read_bytes() for path in (paired.folder / "data/training/processed/reference").iterdir()}
    for path in files:
        path.unlink()
    resumed = paired.type("train-resume", "latest").expect(0)
    assert "answers computed" in resumed.err and {path: path.read_bytes() for path in files} == files


def test_pairs_and_answers_are_not_taken_for_each_other(paired: Project) -> None:
    answers = paired.type("train", "chats.jsonl", "--set", "training.objective=dpo").expect(3)
    assert answers.codes == ["data.no-pairs"] and "training.objective=sft" in answers.helps[0]
    both = paired.type("train", "pairs.jsonl").expect(3)
    assert both.codes == ["data.preference"] and both.helps[0].startswith("--set training.objective=dpo")
    (paired.folder / "mine.py").write_text("def score(answer, reference):\n    return 1.0\n")
    wished = paired.type("train", "pairs.jsonl", "--set", "training.objective=grpo", "--set", "grpo.reward=mine.py:score").expect(3)
    first, _, second = wished.helps[0].partition("; ")
    assert first.startswith("--set 'data.columns={") and second.startswith("--set training.objective=dpo")
    for words in ((), ("--set", "training.objective=dpo")):
        measured = paired.type("train-eval", "tiny", "pairs.jsonl", *words).expect(2)
        assert measured.codes == ["config.eval-of-pairs"] and "objective=dpo" not in measured.helps[0]


def test_a_teacher_is_not_asked_about_pairs(paired: Project) -> None:
    for objective in ("dpo", "kto"):
        words = ("data", "teach", "pairs.jsonl", "--teacher", "tiny", "--output", "taught", "--set", f"training.objective={objective}")
        refused = paired.type(*words).expect(2)
        assert refused.codes == ["config.teach-needs-answers"] and not (paired.folder / "taught").exists()
    good = "data.columns={prompt: prompt, completion: chosen}"
    paired.type(*words[:-2], "--set", "training.objective=sft", "--set", good).expect(0)


@pytest.mark.medium
def test_the_data_commands_and_the_plan_read_pairs(paired: Project) -> None:
    dpo = ("--set", "training.objective=dpo")
    shown = paired.type("data", "show", "pairs.jsonl", "-n", "2", "--json", *dpo).expect(0)
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [(row["row"], row["answer"]) for row in rows] == [(0, "chosen"), (0, "rejected"), (1, "chosen"), (1, "rejected")]
    assert "Paris" in "".join(token["text"] for token in rows[0]["tokens"] if token["target"])
    text = paired.type("data", "show", "pairs.jsonl", "-n", "1", *dpo).expect(0).out
    assert "pairs.jsonl:1, the chosen answer (--row 0)" in text and "pairs.jsonl:1, the rejected answer (--row 0)" in text
    check = paired.type("data", "check", "pairs.jsonl", *dpo).expect(0)
    assert "format preference, 0 cannot be used" in check.out
    assert paired.type("data", "stats", "pairs.jsonl", "--json", *dpo).expect(0).json["rows"] == 20
    planned = paired.type("plan", "pairs.jsonl", "--epochs", "1", "--json", *dpo).expect(0)
    assert planned.json["steps"] == 4


def test_an_answer_that_max_length_cuts_away_is_counted(paired: Project) -> None:
    rows = pairs(20)
    rows[3]["prompt"] += " word" * 60
    write_rows(paired.folder / "pairs.jsonl", rows)
    cut = ("--set", "data.max_length=64", "--set", "data.max_lost_share=1", "--set", "training.objective=dpo")
    answer = paired.type("train", *SHORT, *cut).expect(0)
    assert "1 row left out with nothing to learn" in answer.err and "15 pairs to train on, 4 held out" in answer.err
