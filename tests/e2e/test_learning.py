"""`data teach`, and training from a teacher and from rewards, as a user types them: from rows to the final model, and every refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.models import VOCABULARY, save_tiny
from tests.support.projects import Project, chats, write_rows
from tests.support.tokenizers import save_tokenizer

TEACH = ("data", "teach", "chats.jsonl", "--teacher", "teacher", "--output", "taught", "--top-k", "5")
DISTILL = ("train", "chats.jsonl", "--set", "training.objective=distill", "--set", "distill.teacher=taught")
GRPO = ("train", "chats.jsonl", "--set", "training.objective=grpo", "--reward", "mine.py:score")
SHORT = ("--set", "grpo.max_new_tokens=5", "--set", "grpo.group_size=3")
COUNTS = "def score(answer, reference, row):\n    assert row['messages']\n    return answer.count('e')\n"
NOTHING = "def score(a, b):\n    return None\n"


@pytest.fixture
def taught(project: Project) -> Project:
    """With another tiny model as the teacher, and what it says about the rows."""
    add_teacher(project)
    project.type(*TEACH).expect(0)
    return project


def add_teacher(project: Project) -> None:
    save_tiny(project.folder / "data/models/base/teacher", seed=5)


def reward(project: Project, text: str = COUNTS) -> None:
    (project.folder / "mine.py").write_text(text, encoding="utf-8")


def assert_goes_on_bit_for_bit(project: Project, *words: str) -> None:
    project.type(*words).expect(0)
    loss, weights, first = project.run.by_step("train/loss"), project.run.weights(), project.run.paths.run_id
    stopped = project.type(*words, at=[("llamahome.training.loop:train_step", 3, ["SIGTERM"])])
    stopped.expect(75)
    project.type("train-resume", "latest").expect(0)
    assert project.run.paths.run_id != first and len(project.runs()) == 2
    assert project.run.by_step("train/loss") == loss and len(loss) == 5
    assert project.run.weights() == weights


@pytest.mark.medium
def test_a_student_learns_from_its_teacher_and_a_stopped_run_goes_on_bit_for_bit(taught: Project) -> None:
    assert_goes_on_bit_for_bit(taught, *DISTILL)
    divergence = taught.run.by_step("train/divergence")
    assert divergence[5] < divergence[1]
    loss, cross_entropy = taught.run.by_step("train/loss"), taught.run.by_step("train/cross_entropy")
    for step in loss:
        assert loss[step] == pytest.approx(0.5 * cross_entropy[step] + 0.5 * divergence[step], rel=1e-5)


@pytest.mark.slow
def test_streamed_rows_learn_the_same_from_the_teacher(taught: Project) -> None:
    taught.type(*DISTILL).expect(0)
    loss = taught.run.by_step("train/loss")
    taught.type(*DISTILL, "--set", "data.streaming=true").expect(0)
    assert taught.run.by_step("train/loss") == loss


def test_a_killed_teaching_goes_on_and_a_whole_one_is_left_as_it_is(project: Project) -> None:
    add_teacher(project)
    killed = project.type(*TEACH, at=[("llamahome.data.store.taught:finish", 1, ["SIGKILL"])])
    assert killed.status == -9 and not (project.folder / "taught/teacher.json").exists()
    again = project.type(*TEACH, "--json").expect(0)
    assert "taught: 1 of 1 part are there already" in again.err
    assert again.json["top_k"] == 5 and again.json["examples"] == 24
    files = {path.name: path.read_bytes() for path in (project.folder / "taught").iterdir()}
    project.type(*TEACH).expect(0)
    assert {path.name: path.read_bytes() for path in (project.folder / "taught").iterdir()} == files


@pytest.mark.medium
def test_answers_are_rewarded_and_a_stopped_run_goes_on_bit_for_bit(project: Project) -> None:
    reward(project)
    assert_goes_on_bit_for_bit(project, *GRPO, *SHORT, "--set", "grpo.beta=0.1")
    run = project.run
    for name in ("reward", "reward_std", "answer_tokens", "cut_answers", "groups_without_spread", "entropy", "divergence"):
        assert set(run.by_step(f"train/{name}")) == {1, 2, 3, 4, 5}, name
    assert run.by_step("train/divergence")[1] == pytest.approx(0, abs=1e-5)
    assert all(1 <= length <= 5 for length in run.by_step("train/answer_tokens").values())


@pytest.mark.medium
@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_rows_without_answers_are_rewarded_and_none_is_held_out(project: Project, form: str) -> None:
    reward(project, "def score(answer, reference, row):\n    assert reference == ''\n    return answer.count('e') + row['number'] * 0\n")
    asked = [{"role": "user", "content": "one two"}]
    rows = [{form: "one two" if form == "prompt" and number % 2 else asked, "number": number} for number in range(12)]
    write_rows(project.folder / "chats.jsonl", rows)
    refused = project.type(*GRPO, *SHORT)  # four rows are held out by the settings of the project
    assert refused.status == 3 and refused.codes == ["evaluation.no-answers"] and refused.helps[0].startswith("--set data.eval_split=auto ")
    answer = project.type(*GRPO, *SHORT, "--set", "data.eval_split=auto").expect(0)
    assert f"every row has `{form}` and no answer; none is held out" in answer.err
    assert len(project.run.by_step("train/reward")) > 1 and not project.run.by_step("eval/loss")
    assert "llamahome train-eval" not in answer.out
    settings = ("--config", "output/training/config.yaml")
    for words, code in (
        ((), {"prompt": "data.unknown-format", "messages": "data.no-assistant"}[form]),
        (settings, "evaluation.no-answers"),
    ):
        refused = project.type("train-eval", "latest", "chats.jsonl", *words)
        assert refused.status == 3 and code in refused.codes and refused.helps, refused.err
    scored = ("--set", "data.eval_split=4", "--set", "evaluation.metric=judge.py:score")
    (project.folder / "judge.py").write_text("def score(answer, reference, prompt):\n    return len(answer)\n", encoding="utf-8")
    project.type(*GRPO, *SHORT, *scored).expect(0)
    assert project.run.by_step("eval/score")


@pytest.mark.slow
def test_two_processes_draw_and_reward_the_answers_of_one(project: Project) -> None:
    reward(project)
    project.type(*GRPO, *SHORT).expect(0)
    alone = project.run.by_step("train/reward")
    project.shell(*GRPO, *SHORT, "--world-size", "2").expect(0)
    assert project.run.by_step("train/reward")[1] == pytest.approx(alone[1], rel=1e-6)
    assert set(project.run.by_step("train/reward")) == set(alone)


def _other_tokenizer(project: Project) -> None:
    save_tiny(project.folder / "data/models/base/teacher", seed=5)
    save_tokenizer(project.folder / "data/models/base/teacher", vocabulary=300)


def _changed_row(project: Project) -> None:
    add_teacher(project)
    project.type(*TEACH).expect(0)
    write_rows(project.folder / "chats.jsonl", [*chats(23), {"prompt": "new", "completion": "row"}][:23] + chats(1, seed=77))


def _taught(project: Project) -> None:
    add_teacher(project)
    project.type(*TEACH).expect(0)


def _other_template(project: Project) -> None:
    _taught(project)
    template = project.folder / "data/models/base/tiny/chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")


def _texts(project: Project) -> None:
    reward(project)
    write_rows(project.folder / "chats.jsonl", [{"text": f"{n} the cat sat on the mat"} for n in range(24)])


def _no_template(project: Project) -> None:
    reward(project)
    folder = project.folder / "data/models/base/tiny"
    shutil.rmtree(folder)
    save_tiny(folder)
    save_tokenizer(folder, vocabulary=VOCABULARY, template=None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def _empty_folder(project: Project) -> None:
    (project.folder / "taught").mkdir()


def _broken_folder(project: Project) -> None:
    _empty_folder(project)
    (project.folder / "taught/teacher.json").write_text("{")


def _file_in_the_way(project: Project) -> None:
    add_teacher(project)
    write_rows(project.folder / "taught/mine.jsonl", chats(1))


TAGS = ("--set", "model.new_tokens=[<a>, <b>]")
TEACH_TAGS = 'llamahome data teach DATA --model tiny --teacher teacher --set \'model.new_tokens=["<a>", "<b>"]\' --output NEW'
REFUSED: dict[str, tuple[tuple[str, ...], Callable[[Project], None], str, int, str]] = {
    "no teacher": (DISTILL[:4], lambda project: None, "config.no-teacher", 2, "llamahome data teach DATA"),
    "an empty folder": (DISTILL, _empty_folder, "data.bad-teacher", 3, "llamahome data teach DATA --teacher MODEL --output taught"),
    "a broken folder": (DISTILL, _broken_folder, "data.bad-teacher", 3, "llamahome data teach DATA --teacher MODEL --output taught-2"),
    "a row that was changed": (DISTILL, _changed_row, "data.not-taught", 3, "llamahome data teach with the same data"),
    "another template": (DISTILL, _other_template, "model.other-tokenizer", 2, "llamahome data teach DATA --model tiny --teacher teacher"),
    "a teacher with another tokenizer": (TEACH, _other_tokenizer, "model.other-tokenizer", 2, "a teacher of the student's family"),
    "new tokens that the teacher does not know": (
        (*TEACH, *TAGS),
        add_teacher,
        "model.other-tokenizer",
        2,
        "a teacher that was trained with",
    ),
    "new tokens that were not there": ((*DISTILL, *TAGS), _taught, "model.other-tokenizer", 2, TEACH_TAGS),
    "learned prompts": ((*GRPO, "--set", "data.train_on=all"), reward, "config.no-prompts", 2, "--set data.train_on=last"),
    "a folder with other files": (TEACH, _file_in_the_way, "data.teacher-folder-used", 3, "--output taught-2"),
    "no reward": (GRPO[:4], lambda project: None, "config.no-reward", 2, "--reward FILE.py:FUNCTION"),
    "no file": (GRPO, lambda project: None, "training.reward-unreadable", 2, ""),
    "no base": ((*GRPO, "--method", "full", "--set", "grpo.beta=0.1"), reward, "config.no-reference", 2, "--set grpo.beta=0"),
    "texts": (GRPO, _texts, "data.no-prompts", 3, "rows with messages"),
    "no chat template": (GRPO, _no_template, "data.no-chat-template", 3, ""),
    "no number": ((*GRPO, *SHORT), lambda project: reward(project, NOTHING), "training.reward-failed", 2, "return a finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_is_refused_in_one_line_with_what_mends_it(project: Project, name: str) -> None:
    words, prepare, code, status, hint = REFUSED[name]
    prepare(project)
    answer = project.type(*words)
    assert answer.status == status and answer.codes == [code], answer.err
    assert any(line.startswith(hint) for line in answer.helps or [""]), answer.err
    if code in ("data.no-prompts", "config.no-prompts", "config.no-reward", "config.no-reference"):
        assert project.type("plan", *words[1:]).codes == [code], "a plan refuses what it can know"


def test_a_teacher_that_is_not_there_is_named_by_its_option(project: Project) -> None:
    answer = project.type(*TEACH)
    assert answer.codes == ["model.not-found"] and "--teacher: there is no run and no model 'teacher'" in answer.err


def test_settings_of_another_objective_have_no_effect_and_that_is_said(project: Project) -> None:
    answer = project.type("train", "chats.jsonl", "--max-steps", "1", "--set", "grpo.beta=0.5", "--set", "distill.weight=1").expect(0)
    assert "grpo.beta 0.5 has no effect: training.objective is sft" in answer.err
    assert "distill.weight 1 has no effect" in answer.err


def test_the_reward_is_in_the_settings_of_the_run_and_a_resumed_run_needs_it(project: Project) -> None:
    reward(project)
    project.type(*GRPO, *SHORT, "--max-steps", "2").expect(0)
    saved = project.type("config", "show", "--config", "output/training/config.yaml", "--json").json
    assert "mine.py:score" in json.dumps(saved)
    (project.folder / "mine.py").unlink()
    assert project.type("train-resume", "latest", "--max-steps", "3").codes == ["training.reward-unreadable"]


@pytest.mark.medium
@pytest.mark.parametrize("words", [("train", "chats.jsonl"), GRPO + SHORT], ids=["sft", "grpo"])
def test_the_settings_of_a_run_train_another_one_and_plan_it(project: Project, words: tuple[str, ...]) -> None:
    reward(project)
    project.type(*words, "--max-steps", "2").expect(0)
    again = ("chats.jsonl", "--config", "output/training/config.yaml")
    project.type("plan", *again).expect(0)
    first = project.run
    answer = project.type("train", *again, "--output", "again").expect(0)
    assert "warning[" not in answer.err, answer.err
    shown = project.type("config", "explain", "training.seed", *again[1:]).expect(0)
    assert "default" in shown.out
    assert project.run.weights() == first.weights()


def test_a_run_from_rewards_exports_a_model_like_any_other(project: Project, tmp_path: Path) -> None:
    reward(project)
    project.type(*GRPO, *SHORT, "--method", "full", "--max-steps", "1").expect(0)
    project.type("train-eval", "latest", "chats.jsonl", "--metric", "exact", "--max-new-tokens", "4").expect(0)
