"""A run that a signal disturbs, and what must hold afterwards: whole checkpoints, the same bits at the end, no process left."""

import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import left_of
from tests.support.projects import Answer, Project

from llamahome.checkpoint import manifest

WORDS = (
    "train",
    "chats.jsonl",
    "--set",
    "checkpoint.every=2 steps",
    "--set",
    "evaluation.every=2 steps",
    "--set",
    "checkpoint.keep_best=0",
)
"""5 steps; checkpoints after 2, 4 and 5, written beside the training."""
ORDERLY = {"SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"}


@dataclass(frozen=True)
class Straight:
    """The undisturbed run."""

    weights: dict[str, bytes]
    moments: dict[str, bytes]
    seconds: float


def forget(project: Project, *, prepared: bool = True) -> None:
    """Remove every run of the project, and its prepared rows."""
    for folder in ("output", "data/metrics", *(["data/training/processed"] if prepared else [])):
        shutil.rmtree(project.folder / folder, ignore_errors=True)


def moments(project: Project) -> dict[str, bytes]:
    """The optimizer's tensors in the newest checkpoint, and its position in the data."""
    step, folder = project.run.paths.checkpoints()[-1]
    consumed = re.search(r'"consumed": \d+', (folder / "trainer_state.json").read_text())[0]
    files = {path.name: path.read_bytes() for path in (folder / "optimizer").glob("*.safetensors")}
    return {**files, "position": f"{step} {consumed}".encode()}


def undisturbed(project: Project, *words: str) -> Straight:
    started = time.monotonic()
    project.type(*WORDS, *words).expect(0)
    seconds = time.monotonic() - started
    straight = Straight(project.run.weights(), moments(project), seconds)
    forget(project)
    return straight


def committed(project: Project) -> list[Path]:
    """Every folder that has the name of a checkpoint; AssertionError if one is not whole."""
    found = [path for path in (project.folder / "output/runs").glob("*/checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in found:
        assert manifest.verify(path) == [], path
    return found


def must_hold(project: Project, answer: Answer, sent: str, straight: Straight, *words: str) -> str:
    """Check the exit status of a disturbed run, its checkpoints, and that it goes on to the same end. Returns what happened, in a word."""
    whole = committed(project)
    listened = bool(answer.err) or bool(project.runs())
    if answer.status == 0:
        kind = "finished"
        assert project.run.weights() == straight.weights
    elif answer.status == 75:
        kind = "saved"
        assert whole and sent in ORDERLY
        assert answer.err.count("stopped[run.stopped]") == 1
    elif answer.status == 130:
        kind = "left"
        assert sent in ORDERLY and not whole, answer.err
    else:
        kind = "killed"
        assert answer.status == -signal.Signals[sent], f"{answer.status}\n{answer.err}"
        assert sent == "SIGKILL" or not listened, answer.err
    assert "Traceback" not in answer.err, answer.err
    if kind != "finished":
        (project.type("train-resume", "latest") if whole else project.type(*WORDS, *words)).expect(0)
    assert project.run.weights() == straight.weights
    assert moments(project) == straight.moments
    assert not list(project.run.root.glob("*.tmp")) and not list(project.run.root.glob(".trash*"))
    assert left_of(project, 5) == []
    return kind
