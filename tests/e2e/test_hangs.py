"""A process that makes no progress: the watchdog names it, all start again, and the end is the same; a pause is no hang."""

import contextlib
import signal
import time

import psutil
import pytest
from tests.e2e.test_restarts import WORDS, ranks_of
from tests.support.processes import left_of
from tests.support.projects import Project, chats, wait_until, write_rows

LIMIT = ("--set", "training.hang_timeout=5 s", "--set", "checkpoint.async=false")


@pytest.mark.slow
def test_a_stopped_process_is_named_and_all_start_again_with_the_same_end(project: Project) -> None:
    project.shell("train-distributed", *WORDS).expect(0)
    weights, before = project.run.weights(), project.run.root.resolve()
    with project.start("train-distributed", *WORDS, *LIMIT) as launcher:
        wait_until(lambda: project.run.root.resolve() != before and 4 in project.run.checkpoints, seconds=300)
        ranks_of(launcher.pid)[1].send_signal(signal.SIGSTOP)
        _, err = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, err
    assert "process 1 is silent" in err and "process 0 is waiting for the other processes: starting all processes again" in err
    assert project.run.weights() == weights and left_of(project) == []
    log = (project.run.root / "logs/rank-0.log").read_text()
    assert "no progress for" in log and "hread 0x" in log


@pytest.mark.slow
def test_a_pause_of_the_whole_run_for_longer_than_the_limit_is_no_hang(project: Project) -> None:
    with project.start("train-distributed", *WORDS, *LIMIT) as launcher:
        wait_until(lambda: project.run.root.exists() and 4 in project.run.checkpoints, seconds=300)
        ranks = ranks_of(launcher.pid)
        for process in ranks.values():
            process.send_signal(signal.SIGSTOP)
        time.sleep(8)
        for process in ranks.values():
            process.send_signal(signal.SIGCONT)
        _, err = launcher.communicate(timeout=400)
    assert launcher.returncode == 0 and "no progress" not in err and "starting all" not in err, err


def test_a_single_process_that_hangs_ends_with_its_place_and_its_stack(project: Project) -> None:
    words = ("train", "chats.jsonl", "--set", "training.hang_timeout=1 s", "--set", "checkpoint.async=false")
    answer = project.type(*words, at=[("llamahome.training.loop:set_learning_rate", 5, ["HANG"])]).expect(4)
    assert answer.codes == ["training.hung"]
    assert "between two parts of a step" in answer.err and "loop.py" in answer.err and "in struck" in answer.err
    assert answer.helps == ["llamahome train-resume latest; if it was only slow, with --set training.hang_timeout='1 h'"]
    assert "the stacks of all threads" in (project.run.root / "logs/rank-0.log").read_text()


READING = "llamahome.data.store.row_reader:encode"
LOADING = "llamahome.model.load:check_finite"


@pytest.mark.medium
@pytest.mark.parametrize(
    ("place", "where"), [(READING, "reading the data"), pytest.param(LOADING, "loading the model", marks=pytest.mark.slow)]
)
def test_a_start_that_hangs_ends_with_its_place_and_its_stack_and_leaves_nothing(project: Project, place: str, where: str) -> None:
    words = ("train", "chats.jsonl", "--set", "training.hang_timeout=3 s")
    answer = project.type(*words, at=[(place, 1, ["HANG"])]).expect(4)
    assert answer.codes == ["training.hung"] and f": {where}\n" in answer.err and "in struck" in answer.err
    assert answer.helps == ["the same command again; if it was only slow, with --set training.hang_timeout='1 h'"]
    assert not project.runs() and left_of(project) == []
    project.type(*words).expect(0)


def many_rows(project: Project) -> tuple[str, ...]:
    """The words that train on 10 MB, for which a second process is started that tokenizes."""
    rows = chats(2000)
    for row in rows:
        row["messages"][1]["content"] *= 120
    name = write_rows(project.folder / "many.jsonl", rows).name
    short = ("--set", "data.max_length=256", "--set", "data.max_lost_share=1", "--set", "data.eval_split=0")
    return ("train", name, *short, "--set", "data.streaming=false")


def tokenizing(pid: int) -> list[psutil.Process]:
    """Processes below `pid` that tokenize."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "llamahome.data.store.workers" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_process_that_tokenizes_is_named_and_ended(project: Project, processes: int) -> None:
    """Of two ranks, one tokenizes and the other waits for its lock."""
    words = (*many_rows(project), "--max-steps", "1", "--world-size", str(processes), "--set", "training.hang_timeout=5 s")
    with project.start(*words) as run:
        wait_until(lambda: tokenizing(run.pid) or run.poll() is not None, seconds=120)
        (worker,) = tokenizing(run.pid)
        worker.suspend()
        rank = worker.parent().environ().get("RANK", "0")
        _, err = run.communicate(timeout=200)
    assert run.returncode == 4 and "error[training.hung]" in err, err
    place = f"reading the data (its process {worker.pid} is stopped)"
    assert (place if processes == 1 else f"process {rank} is {place}; process {1 - int(rank)} is reading the data") in err, err
    assert f"process {rank}, innermost last" in err and "in llamahome-prepare" in err
    assert left_of(project) == []
    project.shell(*words).expect(0)
