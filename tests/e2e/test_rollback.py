"""A run that meets harmful rows goes back to its last good checkpoint and past them; a resume of it ends with the same bits."""

import shlex
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.projects import Answer, Project, Prompt, chats, write_rows
from tests.support.workers import free_port
from transformers import AutoTokenizer

from llamahome.checkpoint import manifest

HARMFUL = 7
"""The row whose micro-batch has no finite loss."""
LONG = ("chats.jsonl", "--epochs", "1.6", "--set", "checkpoint.every=2 steps", "--set", "lora.dropout=0.2")
WORDS = (*LONG, "--set", "training.max_bad_steps=1")
Made = tuple[Project, dict[str, str]]


@pytest.fixture
def harmful(make_project: Callable[[Path], Project], tmp_path: Path) -> Callable[[str], Made]:
    """A project one of whose rows holds a token that no other row holds, and the variable that makes it harmful."""

    def make(name: str) -> Made:
        project = make_project(tmp_path / name)
        rows = chats(20)
        rows[HARMFUL]["messages"][0]["content"] += " zzz"
        write_rows(project.folder / "chats.jsonl", rows)
        settings = project.folder / ".config/training_config.yaml"
        settings.write_text(settings.read_text().replace("eval_split: 4", "eval_split: 0"))
        tokenizer = AutoTokenizer.from_pretrained(project.folder / "data/models/base/tiny")
        (token,) = set(tokenizer.encode("zzz", add_special_tokens=False)) - set(tokenizer.encode("aaa ?", add_special_tokens=False))
        return project, {"POISON": f"{token} nan"}

    return make


def events(project: Project, kind: str) -> list[dict]:
    return [event for event in project.run.lines("events") if event["kind"] == kind]


@pytest.mark.medium
def test_a_harmful_row_is_passed_over_and_the_row_can_be_shown(harmful: Callable[[str], Made]) -> None:
    project, poison = harmful("one")
    answer = project.type("train", *WORDS, **poison).expect(0)
    (back, *more) = events(project, "rolled-back")
    assert len(more) <= 1, "the row comes once in an epoch"
    assert f"chats.jsonl:{HARMFUL + 1}" in back["rows"] and back["checkpoint"] == f"checkpoint-{back['step']}"
    assert "back to output/runs/" in answer.err
    losses = project.run.by_step("train/loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6, 7, 8] and all(loss is not None for loss in losses.values()), "no step is missing or bad"
    shown = project.type(*shlex.split(back["show"])[1:], "--json").expect(0)
    assert f'"row": {HARMFUL}' in shown.out and len(shown.out.splitlines()) == len(set(back["rows"]))


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_rolled_back_run_that_is_killed_ends_as_the_one_that_went_on(harmful: Callable[[str], Made], killed_at: int) -> None:
    """Killed in the first step after it went back, before anything is saved, and later, after a checkpoint of the new course."""
    straight, poison = harmful("straight")
    straight.type("train", *WORDS, **poison).expect(0)
    (back, *_) = events(straight, "rolled-back")
    done = back["from_step"]
    killed, poison = harmful("killed")
    strike = [("llamahome.training.loop:train_step", done + killed_at, ["SIGKILL"])]
    assert killed.type("train", *WORDS, at=strike, **poison).status == -signal.SIGKILL
    assert events(killed, "rolled-back"), "it was killed after it went back"
    killed.type("train-resume", "latest", **poison).expect(0)
    assert killed.run.weights() == straight.run.weights()
    assert killed.run.by_step("train/loss") == straight.run.by_step("train/loss")


@pytest.mark.medium
def test_a_run_that_diverges_wherever_it_goes_ends_after_max_rollbacks(harmful: Callable[[str], Made]) -> None:
    project, _ = harmful("all")
    answer = project.type("train", *WORDS, "--set", "training.max_rollbacks=1", at=[], POISON="0 1").expect(0)
    assert not events(project, "rolled-back") and answer.status == 0
    project, _ = harmful("worse")
    project.type("train", *LONG, "--max-steps", "4").expect(0)
    every = "2 nan"  # the end token, which all rows hold
    answer = project.type("train-resume", "latest", "--max-steps", "12", "--set", "training.max_rollbacks=1", POISON=every).expect(6)
    assert answer.codes == ["training.diverged"]
    (back,) = events(project, "rolled-back")
    assert back["step"] < 5 and back["from_step"] == 7


def on_two_ranks(project: Project, other: Prompt, *words: str, **variables: str) -> list[Answer]:
    """The command on two processes that join as torchrun's do; the second one is started in another prompt."""
    port = str(free_port())

    def join(rank: int) -> Answer:
        own = Project(project.folder, other if rank else project.prompt, _typed=1000 * rank)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        return own.type(*words, **place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **variables)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(join, range(2)))


@pytest.fixture
def other(prompt: Prompt, tmp_path: Path) -> Iterator[Prompt]:
    lane = prompt.lane(tmp_path / "pipes")
    yield lane
    lane.close()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_two_processes_go_back_together_past_the_row_of_one_of_them(harmful: Callable[[str], Made], other: Prompt, strategy: str) -> None:
    plain = (*WORDS, "--set", "lora.dropout=0")  # dropout depends on the division into micro-batches
    alone, poison = harmful("alone")
    alone.type("train", *plain, **poison).expect(0)
    both, poison = harmful("both")
    for answer in on_two_ranks(both, other, "train", *plain, "--set", f"distributed.strategy={strategy}", **poison):
        answer.expect(0)
    assert [each["rows"] for each in events(both, "rolled-back")] == [each["rows"] for each in events(alone, "rolled-back")] != []
    expected = alone.run.by_step("train/loss")
    assert both.run.by_step("train/loss") == pytest.approx(expected, rel=1e-4), "the harm of one process has not touched the other"


@pytest.mark.slow
def test_two_processes_that_diverge_wherever_they_go_end_together_after_max_rollbacks(
    harmful: Callable[[str], Made], other: Prompt
) -> None:
    project, _ = harmful("worse")
    project.type("train", *LONG, "--max-steps", "4").expect(0)
    words = ("train-resume", "latest", "--max-steps", "12", "--set", "training.max_rollbacks=1")
    answers = on_two_ranks(project, other, *words, POISON="2 nan")
    assert [answer.status for answer in answers] == [6, 6], [answer.err for answer in answers]
    assert answers[0].codes == ["training.diverged"] and all("Traceback" not in answer.err for answer in answers)
    (back,) = events(project, "rolled-back")
    assert back["step"] < 5 and back["from_step"] == 7
    assert all(manifest.verify(path) == [] for _, path in project.run.paths.checkpoints())
