"""Runs over answers labelled good or bad, as a user types them: what they learn, how they resume, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.test_resume import Course, after_step
from tests.support.projects import Project, labelled, pairs, write_rows

KTO = ("--set", "training.objective=kto")
RUN = ("train", "labels.jsonl", *KTO, "--max-steps", "4", "--set", "checkpoint.every=2 steps", "--set", "preference.desirable_weight=2")


@pytest.fixture
def rated(project: Project) -> Project:
    write_rows(project.folder / "labels.jsonl", labelled(20))
    return project


def test_a_run_over_labelled_answers_learns_which_are_good(rated: Project) -> None:
    answer = rated.type("train", "labels.jsonl", *KTO, "--max-steps", "12").expect(0)
    measured = [line for line in rated.run.lines("metrics") if "train/answer_accuracy" in line]
    assert measured[0]["train/loss"] == pytest.approx(0.5, abs=1e-4), "the model is its own reference before the first update"
    assert measured[0]["train/reference_point"] == 0 == pytest.approx(measured[0]["train/log_ratio"], abs=1e-3)
    assert measured[-1]["train/good_reward"] > measured[-1]["train/bad_reward"] and measured[-1]["train/loss"] < 0.5
    held_out = [line for line in rated.run.lines("metrics") if "eval/answer_accuracy" in line]
    assert held_out[0]["eval/loss"] == pytest.approx(0.5, abs=1e-4)
    assert held_out[-1]["eval/answer_accuracy"] > held_out[0]["eval/answer_accuracy"] == 0, "at first no gain has a sign"
    assert "perplexity" not in answer.out and "answer accuracy" in answer.out and "train-eval" not in answer.out


@pytest.mark.slow
def test_a_stopped_run_over_labelled_answers_ends_as_if_it_had_not_been(
    project: Project, make_project: Callable[[Path], Project], tmp_path: Path
) -> None:
    courses = []
    for folder in (project, make_project(tmp_path / "other")):
        rows = labelled(20)
        write_rows(folder.folder / "labels.jsonl", [row for row in rows if row["label"]] + rows[:7])  # mostly good, so that the point moves
        if courses:
            folder.type(*RUN, at=after_step(2, "SIGINT")).expect(75)
            folder.type("train-resume", "latest").expect(0)
        else:
            folder.type(*RUN).expect(0)
        courses.append((Course.of(folder.run), folder.run.by_step("train/reference_point")))
    assert courses[0] == courses[1] and courses[0][1][3] > 0


def test_labelled_answers_and_others_are_not_taken_for_each_other(rated: Project) -> None:
    answers = rated.type("train", "chats.jsonl", *KTO).expect(3)
    assert answers.codes == ["data.no-labels"] and "training.objective=sft" in answers.helps[0]
    write_rows(rated.folder / "pairs.jsonl", pairs(20))
    both = rated.type("train", "pairs.jsonl", *KTO).expect(3)
    assert both.codes == ["data.no-labels"] and "training.objective=dpo" in both.helps[0]
    plain = rated.type("train", "labels.jsonl").expect(3)
    assert plain.codes == ["data.preference"] and plain.helps[0].startswith("--set training.objective=kto")
    for words in ((), KTO):
        measured = rated.type("train-eval", "tiny", "labels.jsonl", *words).expect(2)
        assert measured.codes == ["config.eval-of-pairs"] and measured.helps[0].startswith("jq ") and "kto" not in measured.helps[0]


@pytest.mark.parametrize(("kept", "said"), [(True, "training.objective sft learns good answers"), (False, "nothing shows what is good")])
def test_labels_of_one_kind_are_warned_of(rated: Project, kept: bool, said: str) -> None:
    write_rows(rated.folder / "labels.jsonl", [row for row in labelled(48) if row["label"] == kept])
    answer = rated.type("train", "labels.jsonl", *KTO, "--max-steps", "1").expect(0)
    assert f"all 24 answers are labelled {'good' if kept else 'bad'}" in answer.err and said in answer.err


@pytest.mark.medium
def test_the_data_commands_and_the_plan_read_labelled_answers(rated: Project) -> None:
    shown = rated.type("data", "show", "labels.jsonl", "-n", "2", "--json", *KTO).expect(0)
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [(row["row"], row["answer"]) for row in rows] == [(0, "good"), (1, "bad")]
    assert "Paris" in "".join(token["text"] for token in rows[0]["tokens"] if token["target"])
    check = rated.type("data", "check", "labels.jsonl", *KTO).expect(0)
    assert "format labelled, 0 cannot be used" in check.out
    assert rated.type("data", "stats", "labels.jsonl", "--json", *KTO).expect(0).json["rows"] == 20
    assert rated.type("plan", "labels.jsonl", "--epochs", "1", "--json", *KTO).expect(0).json["steps"] == 4
