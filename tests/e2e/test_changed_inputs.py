"""What is changed between a stop and a resume is shown or refused, as the table in docs/Reliability.md says."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.projects import ROOT, Project, chats, write_rows

LONG = ("chats.jsonl", "--epochs", "1.6", "--set", "checkpoint.every=1 step", "--set", "lora.rank=4")
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A change: words that are typed, or a file that is changed."""

    words: tuple[str, ...] = ()
    change: Change = lambda folder: None
    refused: str | None = None
    """Code of the error; None if the run goes on."""
    shown: str = ""
    """A part of what is printed."""
    fast: bool = False


def settings(assignment: str, shown: str | None = None, *, refused: str | None = None, fast: bool = False) -> Case:
    return Case(("--set", assignment), refused=refused, shown=assignment.partition("=")[0] if shown is None else shown, fast=fast)


def edit(name: str, change: Callable[[str], str]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return apply


def flip(name: str) -> Change:
    def apply(folder: Path) -> None:
        path = folder / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    return apply


def add_row(folder: Path) -> None:
    write_rows(folder / "chats.jsonl", [*chats(24), *chats(1, seed=5)])


def rename(folder: Path) -> None:
    (folder / "chats.jsonl").rename(folder / "moved.jsonl")


BASE = "data/models/base/tiny"
CASES = {
    "training.learning_rate": settings("training.learning_rate=0.001", "training.learning_rate 0.01 -> 0.001", fast=True),
    "training.epochs": Case(("--epochs", "1"), shown="training.epochs 1.6 -> 1"),
    "training.max_steps": Case(("--max-steps", "5"), shown="the run ends at step 5 instead of 8"),
    "training.max_time": settings("training.max_time=2 h", 'training.max_time null -> "2 h"'),
    "training.schedule": settings("training.schedule=linear", "training.schedule is linear instead of cosine"),
    "training.batch_size": settings("training.batch_size=2", "training.batch_size 4 -> 2"),
    "training.micro_batch_tokens": settings("training.micro_batch_tokens=64"),
    "training.seed": settings("training.seed=3", "training.seed 0 -> 3"),
    "training.weight_decay": settings("training.weight_decay=0.1"),
    "lora.dropout": settings("lora.dropout=0.1"),
    "data.streaming": settings("data.streaming=true"),
    "evaluation.metric": settings("evaluation.metric=token_accuracy"),
    "training.method": settings("training.method=full", "--set training.method=lora", refused="training.weights-differ"),
    "lora.rank": settings("lora.rank=8", "--set lora.rank=4", refused="training.weights-differ", fast=True),
    "lora.alpha": settings("lora.alpha=64", "--set lora.alpha=32", refused="training.weights-differ"),
    "lora.target_modules": settings(
        "lora.target_modules=[q_proj]", "--set lora.target_modules=all-linear", refused="training.weights-differ"
    ),
    "lora.init": settings("lora.init=pissa", "--set lora.init=default", refused="training.weights-differ"),
    "model.new_tokens": settings("model.new_tokens=[<tag>]", "--set 'model.new_tokens=[]'", refused="training.weights-differ", fast=True),
    "model.eos_token": settings(
        "model.eos_token=<pad>", 'what changed with it: model.eos_token null -> "<pad>"', refused="checkpoint.data-changed"
    ),
    "model.adapter": settings("model.adapter=elsewhere", "", refused="model.adapter-differs"),
    "training.objective": settings("training.objective=orpo", "--from-adapter output/", refused="training.objective-differs", fast=True),
    "training.optimizer": settings("training.optimizer=adafactor", "--set training.optimizer=adamw", refused="training.optimizer-differs"),
    "model.quantization": settings("model.quantization=int8", "--allow-changed base", refused="checkpoint.base-changed"),
    "data.max_length": settings("data.max_length=70", "--allow-changed data", refused="checkpoint.data-changed"),
    "data.train_on": settings(
        "data.train_on=all", "what changed with it: data.train_on assistant -> all", refused="checkpoint.data-changed"
    ),
    "data.eval_split": settings("data.eval_split=6", "--allow-changed data", refused="checkpoint.data-changed"),
    "data.mixture": settings("data.mixture={chats.jsonl: 2}", "--allow-changed data", refused="checkpoint.data-changed"),
    "a row is added": Case(change=add_row, refused="checkpoint.data-changed", shown="--allow-changed data", fast=True),
    "a row is changed": Case(
        change=edit("chats.jsonl", lambda text: text.replace("3: ", "3: so ")),
        refused="checkpoint.data-changed",
        shown="--allow-changed data",
    ),
    "rows change places": Case(
        change=edit("chats.jsonl", lambda text: "".join(reversed(text.splitlines(keepends=True)))),
        refused="checkpoint.data-changed",
        shown="--allow-changed data",
    ),
    "a row is added, and allowed": Case(("--allow-changed", "data"), add_row, shown="resuming"),
    "the file is gone": Case(change=rename, refused="data.not-found"),
    "the chat template": Case(
        change=edit(f"{BASE}/chat_template.jinja", lambda text: text.replace("<|im_start|>", "<|im_start|> ")),
        refused="checkpoint.data-changed",
        shown="--allow-changed data",
    ),
    "the base's weights": Case(
        change=flip(f"{BASE}/model.safetensors"), refused="checkpoint.base-changed", shown="--allow-changed base", fast=True
    ),
    "the base's config": Case(
        change=edit(f"{BASE}/config.json", lambda text: text.replace("1e-06", "1e-05")), refused="checkpoint.base-changed"
    ),
    "the newest checkpoint": Case(
        change=lambda folder: flip(next((folder / "output/training/checkpoint-3").glob("model/*.safetensors")).relative_to(folder))(folder),
        shown="an older checkpoint is used instead of checkpoint-3",
    ),
}


@pytest.fixture(scope="module")
def stopped(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run that was stopped after step 3 of 8."""
    project = make_project(tmp_path_factory.mktemp("stopped") / "project")
    project.type("train", *LONG, at=[("llamahome.training.loop:train_step", 3, ["SIGINT"])]).expect(75)
    return project


@pytest.mark.parametrize("name", [name if case.fast else pytest.param(name, marks=pytest.mark.slow) for name, case in CASES.items()])
def test_what_was_changed_is_shown_or_refused(stopped: Project, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    project = Project(tmp_path / "project", stopped.prompt)
    shutil.copytree(stopped.folder, project.folder, symlinks=True)
    before = project.folder / "output/training"
    kept = {path: path.read_bytes() for path in before.rglob("checkpoint-2/**/*") if path.is_file()}
    case.change(project.folder)
    answer = project.type("train-resume", "latest", *case.words)
    if case.refused is None:
        answer.expect(0)
        assert (before / "final").is_dir()
    else:
        assert answer.status in (2, 3, 7) and case.refused in answer.codes, answer.err
        assert {path: path.read_bytes() for path in kept} == kept and not (before / "final").exists()
    assert case.shown in answer.err


def test_the_table_in_the_docs_lists_every_case() -> None:
    text = (ROOT / "docs/Reliability.md").read_text(encoding="utf-8").partition("### What is changed between stop and resume")[2]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]
    documented = {cells[0].strip("`"): cells[1:] for cells in rows if len(cells) == 3}
    expected = {name: "refused" if case.refused else "goes on" for name, case in CASES.items()}
    assert {name: cells[0] for name, cells in documented.items()} == expected
    assert all(case.refused in documented[name][1] for name, case in CASES.items() if case.refused)
