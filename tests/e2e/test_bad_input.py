"""Mistakes of users: each problem is one block with code, place and hint, the exit status fits, and no file is changed or made."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.projects import Answer, Project, chats, write_rows


@dataclass(frozen=True)
class Mistake:
    """The files, the command, and what stderr must show."""

    status: int
    codes: list[str]
    shown: list[str]
    words: tuple[str, ...] = ("train", "rows.jsonl")
    prepare: Callable[[Path], Any] = lambda folder: None


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def rows(*first: dict[str, Any]) -> Callable[[Path], Any]:
    return lambda folder: write_rows(folder / "rows.jsonl", [*first, *chats(6)])


def broken_at(line: int) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        lines = [json.dumps(row) for row in chats(6)]
        lines[line - 1] = lines[line - 1][:40]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")

    return prepare


def model_without(*names: str, instead: str | None = None) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        shutil.copytree(folder / "data/models/base/tiny", folder / "mine")
        for name in names:
            (folder / "mine" / name).unlink()
        if instead:
            (folder / "mine" / instead).write_bytes(b"\x80\x04.")

    return prepare


def text(name: str, content: str) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return prepare


TRAIN_MINE = ("train", "chats.jsonl", "--model", "mine")
SETTINGS = "training:\n  epcohs: 3\n  batch_size: many\ntrainig:\n  seed: 1\ndata: {max_length: 4}\n"
MISTAKES = {
    "no such data": Mistake(3, ["data.not-found"], ["rows.jsonl"]),
    "no such evaluation data": Mistake(
        3, ["data.not-found"], ["nothing.jsonl"], ("train", "chats.jsonl", "--eval-data", "nothing.jsonl", "--set", "data.eval_split=auto")
    ),
    "an empty file": Mistake(3, ["data.empty-file"], ["rows.jsonl"], prepare=text("rows.jsonl", "")),
    "an empty folder": Mistake(3, ["data.empty-folder"], ["raw"], ("train", "raw"), lambda folder: (folder / "raw").mkdir()),
    "a folder without rows": Mistake(3, ["data.empty-folder"], ["raw", "photo.jpg"], ("train", "raw"), text("raw/photo.jpg", "x")),
    "broken JSON": Mistake(3, ["data.bad-json", "data.bad-rows"], ["rows.jsonl:5", "column"], prepare=broken_at(5)),
    "a misspelt role": Mistake(
        3,
        ["data.unknown-role", "data.bad-rows"],
        ["rows.jsonl:1", '"usr"', '"user"'],
        prepare=rows(turns(("usr", "a"), ("assistant", "b"))),
    ),
    "a missing role": Mistake(
        3,
        ["data.missing-key", "data.bad-rows"],
        ["rows.jsonl:1", '"role"'],
        prepare=rows({"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}),
    ),
    "no assistant turn": Mistake(3, ["data.no-assistant", "data.bad-rows"], ["rows.jsonl:1"], prepare=rows(turns(("user", "a")))),
    "every answer cut off": Mistake(
        3, ["data.no-targets"], ["data.max_length 16", "chats.jsonl"], ("train", "chats.jsonl", "--set", "data.max_length=16")
    ),
    "a model without a chat template": Mistake(
        3, ["data.no-chat-template"], ["model.chat_template"], TRAIN_MINE, model_without("chat_template.jinja")
    ),
    "no such model": Mistake(2, ["model.not-found"], ["'tinny'"], ("train", "chats.jsonl", "--model", "tinny")),
    "a hub id without the hub": Mistake(4, ["model.hub-failed"], ["HF_HUB_OFFLINE"], ("train", "chats.jsonl", "--model", "org/name")),
    "a hub id as an argument without the hub": Mistake(
        4, ["model.hub-failed"], ["MODEL:", "llamahome runs list"], ("train-eval", "org/name", "chats.jsonl")
    ),
    "a model without weights": Mistake(2, ["model.no-weights"], ["mine"], TRAIN_MINE, model_without("model.safetensors")),
    "pickled weights": Mistake(
        2, ["model.pickled-weights"], ["mine", "code"], TRAIN_MINE, model_without("model.safetensors", instead="pytorch_model.bin")
    ),
    "a model folder without config": Mistake(2, ["model.no-config"], ["mine"], TRAIN_MINE, model_without("config.json")),
    "an empty model folder": Mistake(2, ["model.no-config"], ["mine"], TRAIN_MINE, lambda folder: (folder / "mine").mkdir()),
    "an unknown target module": Mistake(
        2, ["lora.no-such-module"], ["q_porj", "q_proj"], ("train", "chats.jsonl", "--set", "lora.target_modules=[q_porj]")
    ),
    "settings": Mistake(
        2,
        ["config.unknown-key", "config.wrong-type", "config.unknown-section", "config.out-of-range"],
        ["mine.yaml:2:3", "training.epochs", "mine.yaml:3:15", "'many'", "mine.yaml:4:1", "training", "mine.yaml:6:20"],
        ("train", "chats.jsonl", "--config", "mine.yaml"),
        text("mine.yaml", SETTINGS),
    ),
    "settings with config check": Mistake(
        2,
        ["config.unknown-key", "config.wrong-type", "config.unknown-section", "config.out-of-range"],
        ["mine.yaml:2:3"],
        ("config", "check", "mine.yaml"),
        text("mine.yaml", SETTINGS),
    ),
    "invalid YAML": Mistake(
        2,
        ["config.bad-yaml"],
        ["mine.yaml:1"],
        ("train", "chats.jsonl", "--config", "mine.yaml"),
        text("mine.yaml", "training: {epochs: 1"),
    ),
    "no such settings file": Mistake(2, ["config.no-such-file"], ["nothing.yaml"], ("train", "chats.jsonl", "--config", "nothing.yaml")),
    "--set with mistakes": Mistake(
        2,
        ["config.unknown-key", "config.out-of-range"],
        ["training.epoch", "training.epochs", "-1"],
        ("train", "chats.jsonl", "--set", "training.epoch=3", "--set", "training.batch_size=-1"),
    ),
    "--set without a value": Mistake(2, ["config.bad-assignment"], ["--set"], ("train", "chats.jsonl", "--set", "training.epochs")),
    "an unknown command": Mistake(2, ["usage.command-line"], ["'tarin'", "'train'"], ("tarin", "chats.jsonl")),
    "an unknown option": Mistake(2, ["usage.command-line"], ["--eposh", "--epochs"], ("train", "chats.jsonl", "--eposh", "3")),
    "a word for a number": Mistake(2, ["usage.command-line"], ["--epochs"], ("train", "chats.jsonl", "--epochs", "many")),
    "no data path": Mistake(2, ["usage.command-line"], ["DATA_PATH"], ("train",)),
    "no such checkpoint": Mistake(7, ["checkpoint.not-a-checkpoint"], ["nowhere"], ("train-resume", "nowhere")),
    "a model as a checkpoint": Mistake(
        7, ["checkpoint.not-a-checkpoint"], ["without optimizer"], ("train-resume", "data/models/base/tiny")
    ),
    "a file as a checkpoint": Mistake(7, ["checkpoint.not-a-checkpoint"], ["a file"], ("train-resume", "chats.jsonl")),
    "latest without a run": Mistake(7, ["checkpoint.none"], ["no run"], ("train-resume", "latest")),
    "an unknown --allow-changed": Mistake(2, ["usage.bad-choice"], ["weather"], ("train-resume", "latest", "--allow-changed", "weather")),
    "an output that is a file": Mistake(2, ["output.not-a-folder"], ["chats.jsonl"], ("train", "chats.jsonl", "--output", "chats.jsonl")),
    "an output folder that is not empty": Mistake(
        2, ["output.not-empty"], ["mine"], ("train", "chats.jsonl", "--output", "mine"), text("mine/letter.txt", "x")
    ),
    "an output below a file": Mistake(
        4, ["machine.output-not-writable"], ["chats.jsonl"], ("train", "chats.jsonl", "--output", "chats.jsonl/x")
    ),
    "an output that is not writable": Mistake(
        4, ["machine.output-not-writable"], ["/proc/here"], ("train", "chats.jsonl", "--output", "/proc/here")
    ),
    "evaluation of an unknown model": Mistake(2, ["model.not-found"], ["nobody", "runs list"], ("train-eval", "nobody", "chats.jsonl")),
    "evaluation on missing data": Mistake(3, ["data.not-found"], ["nothing.jsonl"], ("train-eval", "tiny", "nothing.jsonl")),
    "a chat with an unknown model": Mistake(
        2, ["model.not-found"], ["nobody", "help: smollm2-135m-instruct, or"], ("chat", "nobody", "--prompt", "hello")
    ),
    "an unknown run": Mistake(2, ["run.unknown"], ["nothing"], ("runs", "show", "nothing")),
    "info about an unknown model": Mistake(2, ["model.not-here"], ["nothing"], ("models", "info", "nothing")),
    "info about a folder without a model": Mistake(
        2, ["model.no-config"], ["no config.json", "help: llamahome models info smollm2"], ("models", "info", "data")
    ),
    "fetching a folder without a model": Mistake(
        2, ["model.no-config"], ["help: llamahome models fetch smollm2"], ("models", "fetch", "data")
    ),
    "an option that is left out": Mistake(2, ["usage.command-line"], ["Choose from: adapter, merged, gguf, ollama"], ("export", "latest")),
    "a row past the end": Mistake(2, ["usage.no-such-row"], ["99"], ("data", "show", "chats.jsonl", "--row", "99")),
    "a sample in a table": Mistake(
        2, ["usage.bad-choice"], ["ends in .csv", "help: llamahome data sample x.jsonl"], ("data", "sample", "x.csv")
    ),
    "a sample over a file": Mistake(2, ["usage.file-exists"], ["chats.jsonl"], ("data", "sample", "chats.jsonl")),
    "an unknown key": Mistake(2, ["config.unknown-key"], ["training.epochs"], ("config", "explain", "training.epcohs")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported_with_place_and_hint_and_makes_no_files(project: Project, name: str) -> None:
    mistake = MISTAKES[name]
    mistake.prepare(project.folder)
    before = project.files()
    answer = project.type(*mistake.words).expect(mistake.status)
    assert answer.codes == mistake.codes, answer.err
    assert [part for part in mistake.shown if part not in answer.err] == [], answer.err
    assert answer.helps and not answer.out
    assert {path for path in project.files() if not path.startswith("data/training/")} == set(before), "only caches are made"
    assert all(project.files()[path] == content for path, content in before.items()), "nothing is changed"


def test_the_hint_for_truncated_answers_works(project: Project) -> None:
    (help_,) = project.type("train", "chats.jsonl", "--set", "data.max_length=16").expect(3).helps
    project.type("train", "chats.jsonl", "--max-steps", "1", *shlex.split(help_)[:2]).expect(0)


def test_the_hint_for_bad_rows_works_and_counts_them(project: Project) -> None:
    broken_at(2)(project.folder)
    help_ = project.type("train", "rows.jsonl").expect(3).helps[-1]
    words = shlex.split(help_)
    answer = project.type("train", "rows.jsonl", "--max-steps", "1", "--set", "data.eval_split=0", *words[words.index("--set") :])
    assert "1 bad row left out" in answer.expect(0).err


def test_the_hint_for_a_missing_template_works_and_the_model_keeps_the_template(project: Project) -> None:
    template = project.folder / "data/models/base/tiny/chat_template.jinja"
    template.rename(project.folder / "mine.jinja")
    answer = project.type("train", "chats.jsonl").expect(3)
    assert "--set model.chat_template=" in answer.helps[0]
    project.type("train", "chats.jsonl", "--max-steps", "1", "--set", "model.chat_template=mine.jinja").expect(0)
    assert (project.run.root / "final/chat_template.jinja").read_text() == (project.folder / "mine.jinja").read_text()
    project.type("chat", "output/training/final", "--prompt", "hello", "--max-new-tokens", "2").expect(0)


def test_a_run_is_never_overwritten(project: Project) -> None:
    project.type("train", "chats.jsonl", "--max-steps", "1", "--output", "mine").expect(0)
    before = project.files()
    answer = project.type("train", "chats.jsonl", "--output", "mine").expect(2)
    assert answer.codes == ["output.holds-a-run"] and answer.helps == ["llamahome train-resume mine"]
    assert project.files() == before
    project.type(*answer.helps[0].split()[1:]).expect(0)


def test_a_damaged_model_file_leaves_no_run(project: Project) -> None:
    weights = project.folder / "data/models/base/tiny/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert project.type("train", "chats.jsonl").expect(2).codes == ["model.unreadable"]
    assert not (project.folder / "output").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root may mount")
@pytest.mark.parametrize("place", ["output", "elsewhere"])
def test_a_read_only_disk_is_reported_before_any_work(project: Project, place: str) -> None:
    disk = project.folder / place
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        words = () if place == "output" else ("--output", "elsewhere/run")
        answer = project.type("train", "chats.jsonl", *words).expect(4)
        assert answer.codes == ["machine.output-not-writable"] and "--output" in answer.helps[0] and "[1/3]" not in answer.err
        if place == "output":
            project.type("train", "chats.jsonl", "--max-steps", "1", "--output", "mine").expect(0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root may mount")
def test_a_full_disk_is_reported_before_the_first_step(project: Project) -> None:
    disk = project.folder / "output"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        answer = project.type("train", "chats.jsonl").expect(7)
        assert answer.codes == ["checkpoint.write-failed"] and "needs about" in answer.err and "step=1" not in answer.err
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_debug_shows_where_an_error_came_from(project: Project) -> None:
    answer: Answer = project.type("train", "nothing.jsonl", "--debug")
    assert answer.status == 3 and "Traceback" in answer.err and "data.not-found" in answer.err


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(project: Project) -> None:
    answer = project.type("train", "chats.jsonl", "--set", "training.learning_rate=1e30").expect(6)
    assert answer.codes == ["training.diverged"] and "chats.jsonl:" in answer.err
    assert answer.helps == ["start again with --set training.learning_rate=0.013   (and look at those rows)"]
    kinds = [event["kind"] for event in project.run.lines("events")]
    assert [kind for kind in kinds if kind != "alert"] == ["started", "bad-step", "bad-step", "bad-step", "failed"]
    assert project.type("runs", "list", "--json").json[0]["state"] == "failed"
