"""One of two processes has a full disk, no memory, a slow disk or another view of the folder in a save or a resume: nothing is lost."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.e2e.test_interrupts import content
from tests.support.disturbed import committed, moments
from tests.support.pair_of_ranks import Pair, Strikes
from tests.support.projects import Project, Prompt, wait_until

from llamahome.distributed.agent import is_retryable
from llamahome.distributed.failures import read_failures, remove_failures

WORDS = ("train", "chats.jsonl", "--method", "full", "--max-steps", "6", "--world-size", "2")
OFTEN = ("--set", "checkpoint.every=2 steps", "--set", "checkpoint.keep_last=9", "--set", "checkpoint.keep_best=0")
"""6 steps; checkpoints after 2, 4 and 6, of which both ranks write files."""
PART = "llamahome.checkpoint.collective_save:_write_share"
"""The part of one rank in a save."""
Ending = tuple[dict[str, bytes], dict[str, bytes]]


def words(placement: str = "replicate", *more: str) -> tuple[str, ...]:
    return (*WORDS, *OFTEN, "--set", f"distributed.strategy={placement}", *more)


@pytest.fixture(scope="module")
def ending(make_project, prompts: tuple[Prompt, Prompt], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ending]:
    """How the undisturbed run ends with a placement."""

    @functools.cache
    def of(placement: str) -> Ending:
        pair = Pair(make_project(tmp_path_factory.mktemp(placement) / "project"), prompts)
        train(pair, words(placement))
        return pair.run.weights(), moments(pair.project)

    return of


def train(pair: Pair, typed: tuple[str, ...], at: tuple[Strikes, Strikes] = ((), ()), **more) -> None:
    for answer in pair.type(*typed, at=at, **more):
        answer.expect(0)


def events(pair: Pair, kind: str) -> list[dict]:
    return [event for event in pair.run.lines("events") if event["kind"] == kind]


@pytest.mark.medium
@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_sharded_checkpoints_written_beside_the_training_are_those_written_in_the_loop(
    make_project: Callable[[Path], Project], prompts: tuple[Prompt, Prompt], tmp_path: Path, method: str
) -> None:
    found = []
    for written in ("true", "false"):
        pair = Pair(make_project(tmp_path / written / "project"), prompts)
        train(pair, words("shard", "--method", method, "--set", f"checkpoint.async={written}"))
        assert events(pair, "saves-in-the-loop") == []
        found.append({path.name: content(path) for path in committed(pair.project)})
    assert found[0] == found[1] and sorted(found[0]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("rank", "placement"),
    [(1, "replicate"), pytest.param(0, "shard", marks=pytest.mark.slow), pytest.param(1, "shard", marks=pytest.mark.slow)],
)
def test_a_disk_that_is_full_for_one_process_fails_that_save_and_no_other(
    pair: Pair, ending: Callable[[str], Ending], rank: int, placement: str
) -> None:
    full = [(PART, 2, ["LIMIT 20000"]), (PART, 3, ["LIMIT -1"])]
    train(pair, words(placement), at=(full, []) if rank == 0 else ([], full))
    assert [path.name for path in sorted(committed(pair.project))] == ["checkpoint-2", "checkpoint-6"]
    (failed,) = events(pair, "save-failed")
    assert failed["step"] == 4 and "File too large" in failed["message"]
    assert (pair.run.weights(), moments(pair.project)) == ending(placement)


@pytest.mark.medium
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_memory_that_runs_out_in_a_save_of_one_process_fails_that_save_and_no_other(
    pair: Pair, ending: Callable[[str], Ending], rank: int
) -> None:
    full = [("llamahome.distributed.tensorfiles:safetensors.torch.save_file", 3, ["MEMORY"])]
    train(pair, words(), at=(full, []) if rank == 0 else ([], full))
    assert [path.name for path in sorted(committed(pair.project))] == ["checkpoint-2", "checkpoint-6"]
    (failed,) = events(pair, "save-failed")
    assert failed["step"] == 4 and "memory ran out" in failed["message"]
    assert (pair.run.weights(), moments(pair.project)) == ending("replicate")


SLOW_DISK = {
    "one process writes its part": ([], [(PART, 2, ["SLEEP 14"])]),
    "old checkpoints are verified": ([("llamahome.saving:retention.apply", 1, ["SLEEP 14"])], []),
    "the final model is written": ([("llamahome.saving:store.write_folder", 1, ["SLEEP 14"])], []),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SLOW_DISK)
@pytest.mark.parametrize("placement", ["replicate", "shard"])
def test_a_disk_that_is_slower_than_the_limit_of_an_exchange_only_takes_time(
    pair: Pair, ending: Callable[[str], Ending], what: str, placement: str
) -> None:
    train(pair, words(placement, "--set", "distributed.timeout=8 s"), at=SLOW_DISK[what])
    assert [path.name for path in sorted(committed(pair.project))] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert (pair.run.weights(), moments(pair.project)) == ending(placement)


def killed_in_the_last_save(pair: Pair) -> Path:
    """A run with checkpoints of steps 2 and 4, killed when that of step 6 was to be committed; its folder."""
    before = "llamahome.durable:rename?checkpoint-6", 1, ["SIGKILL"]
    assert [answer.status for answer in pair.type(*words(), at=([before], []))] == [-9, 4]
    return pair.run.root.resolve()


@pytest.mark.medium
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_processes_that_see_different_newest_checkpoints_resume_the_one_that_process_0_sees(
    pair: Pair, ending: Callable[[str], Ending], rank: int
) -> None:
    root = killed_in_the_last_save(pair)
    late: dict[str, str] = {"UNSEEN": "checkpoint-4 4"}
    first, _ = pair.type("train-resume", "latest", variables=(late, {}) if rank == 0 else ({}, late))
    assert first.expect(0).err.count("process 1 had found checkpoint-") == 1
    assert (root / "superseded-checkpoint-4").exists() == (rank == 0)
    assert (pair.run.weights(), moments(pair.project)) == ending("replicate")


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_not_resumed_by_any(pair: Pair, ending: Callable[[str], Ending]) -> None:
    killed_in_the_last_save(pair)
    never: dict[str, str] = {"UNSEEN": "checkpoint-4 1000000"}
    answers = pair.type("train-resume", "latest", variables=({}, never))
    assert [answer.status for answer in answers] == [7, 7] and answers[0].codes == ["checkpoint.ranks-differ"], answers
    train(pair, ("train-resume", "latest"))
    assert (pair.run.weights(), moments(pair.project)) == ending("replicate")


@pytest.mark.slow
def test_a_later_attempt_in_which_one_process_sees_no_checkpoint_ends_and_the_next_one_resumes(
    pair: Pair, ending: Callable[[str], Ending], tmp_path: Path
) -> None:
    root = killed_in_the_last_save(pair)
    attempt = {"LLAMAHOME_BEGUN": str(root), "LLAMAHOME_LAUNCH": str(tmp_path), "LLAMAHOME_ROUND": "1"}
    answers = pair.type(*words(), variables=(attempt, {**attempt, "ALL_UNSEEN": "3"}))
    causes = read_failures(tmp_path)
    assert [answer.status for answer in answers] == [7, 7], answers
    assert "process 0 resumes a checkpoint, process 1 does not see one" in causes[0].error.problems[0].message
    assert is_retryable({0: 7, 1: 7}, causes, has_run=True)
    remove_failures(tmp_path)
    attempt["LLAMAHOME_ROUND"] = "2"
    for answer in pair.type(*words(), variables=(attempt, attempt)):
        answer.expect(0)
    assert (pair.run.weights(), moments(pair.project)) == ending("replicate")


@pytest.mark.medium
def test_a_run_that_trains_is_neither_resumed_nor_pruned(project: Project, prompts: tuple[Prompt, Prompt]) -> None:
    """Here the first process copies its best checkpoint to final/ while the second one types."""
    alone = ("train", "chats.jsonl", "--set", "checkpoint.every=2 steps", "--set", "evaluation.every=2 steps")
    trains, types = (Project(project.folder, prompt, _typed=100 * number) for number, prompt in enumerate(prompts, 1))
    copying = [("llamahome.final_model:_copy", 1, ["STRUCK", "WAIT go"])]
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(trains.type, *alone, "--set", "output.final=best", at=copying)
        wait_until(lambda: (project.folder / "struck").exists())
        told = [types.type("train-resume", "latest"), types.type("checkpoint", "prune", "latest", "--keep-best", "0")]
        (project.folder / "go").touch()
        done.result().expect(0)
    assert [answer.codes for answer in told] == [["checkpoint.in-use"]] * 2, [answer.err for answer in told]
    assert "is training in this run now" in told[0].err and told[0].helps == [f"llamahome runs tail {project.runs()[0]}"]
    best = min(project.run.by_step("eval/loss").items(), key=lambda each: each[1] if each[0] else 9e9)[0]
    assert project.run.weights() == project.run.weights(f"checkpoint-{best}/model")
    types.type("train-resume", "latest").expect(0)


@pytest.mark.medium
def test_of_two_commands_that_resume_a_run_at_the_same_time_one_is_refused(project: Project, prompts: tuple[Prompt, Prompt]) -> None:
    """Before the first step there is no heartbeat that the other one could see."""
    project.type("train", "chats.jsonl", "--set", "checkpoint.every=2 steps").expect(0)
    first, second = (Project(project.folder, prompt, _typed=100 * number) for number, prompt in enumerate(prompts, 1))
    words = ("train-resume", "latest", "--max-steps", "7")
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(first.type, *words, at=[("llamahome.pipeline:read_data", 1, ["STRUCK", "WAIT go"])])
        wait_until(lambda: (project.folder / "struck").exists())
        told = second.type(*words)
        (project.folder / "go").touch()
        done.result().expect(0)
    assert told.codes == ["checkpoint.in-use"] and told.helps == [f"llamahome runs tail {project.runs()[0]}"], told.err
    assert 7 in project.run.checkpoints
    second.type("train-resume", "latest", "--max-steps", "9").expect(0)


def test_a_folder_of_checkpoints_that_cannot_be_read_is_a_warning_once_the_save_is_committed(project: Project) -> None:
    words = ("train", "chats.jsonl", "--set", "checkpoint.every=2 steps")
    answer = project.type(*words, at=[("llamahome.checkpoint.retention:deletable", 1, ["EIO"])]).expect(0)
    assert "old checkpoints could not be looked at" in answer.err and project.run.checkpoints == [4, 5]
