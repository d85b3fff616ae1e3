"""Prepared or streamed, one source or several: the same training, also when a resume changes from one to the other."""

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
from tests.support.projects import Project, chats, pairs, write_rows

STORES = Path("data/training/processed")
ROUGH = (
    "--set",
    "data.on_bad_row=skip",
    "--set",
    "data.max_bad_share=0.2",
    "--set",
    "data.on_overlong=drop",
    "--set",
    "data.max_lost_share=1",
)
LONG = ("chats.jsonl", "--epochs", "1.5", "--set", "checkpoint.every=2 steps", "--set", "data.max_length=48", *ROUGH)
STREAM, PREPARE = ("--set", "data.streaming=true"), ("--set", "data.streaming=false")


def rough_rows(project: Project) -> None:
    """Rows of which some are bad and some too long."""
    rows = chats(40)
    rows[7]["messages"][0]["content"] += " word" * 60
    rows[8]["messages"].pop()
    lines = [json.dumps(row) for row in rows]
    lines[3] = lines[3][:-5]
    (project.folder / "chats.jsonl").write_text("\n".join(lines) + "\n")


def learned(project: Project) -> tuple[object, ...]:
    names = ("train/loss", "train/tokens", "train/grad_norm", "eval/loss")
    return project.run.weights(), *(project.run.by_step(name) for name in names)


def stores(project: Project) -> list[str]:
    return sorted(path.name for path in (project.folder / STORES).glob("*") if path.name != "index")


@pytest.fixture
def rough(project: Project) -> Project:
    rough_rows(project)
    return project


@pytest.mark.medium
def test_streamed_and_prepared_runs_learn_the_same_to_the_bit(rough: Project) -> None:
    streamed = rough.type("train", *LONG, *STREAM).expect(0)
    assert stores(rough) == [] and "tokenized while the model trains" in streamed.err
    one = learned(rough)
    counted = [line for line in rough.run.lines("events") if line["kind"] == "rows"]
    assert counted[-1]["step"] == max(rough.run.checkpoints) and counted[-1]["rows"] == 54 and counted[-1]["bad"] >= 2
    assert "since step 0: " in streamed.err and "bad rows left out" in streamed.err
    rough.type("train", *LONG, *PREPARE).expect(0)
    assert learned(rough) == one and len(stores(rough)) == 1


@pytest.mark.medium
@pytest.mark.parametrize(("before", "after"), [(STREAM, PREPARE), (PREPARE, STREAM)])
def test_a_resume_may_change_from_one_to_the_other(rough: Project, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    rough.type("train", *LONG, *before).expect(0)
    straight = learned(rough)
    rough.type("train", *LONG, *before, at=[("llamahome.training.loop:train_step", 4, ["SIGINT"])]).expect(75)
    rough.type("train-resume", "latest", *after).expect(0)
    assert learned(rough) == straight


@pytest.mark.medium
def test_a_bad_row_in_a_stream_names_its_place_and_the_run_goes_on_without_it(project: Project) -> None:
    rows = [json.dumps(row) for row in chats(600)]
    rows[555] = '{"messages"'
    (project.folder / "chats.jsonl").write_text("\n".join(rows) + "\n")
    words = ("chats.jsonl", "--set", "training.batch_size=16", "--set", "checkpoint.every=1 step", "--set", "data.eval_split=0", *STREAM)
    refused = project.type("train", *words).expect(3)
    assert refused.codes == ["data.bad-json", "data.bad-rows"] and "chats.jsonl:556" in refused.err
    assert "on_bad_row=skip" in refused.helps[-1]
    done = project.type("train-resume", "latest", "--set", "data.on_bad_row=skip", "--set", "data.max_bad_share=0.01").expect(0)
    assert "1 bad row left out" in done.err and math.isfinite(project.run.by_step("train/loss")[38])


@pytest.mark.medium
def test_several_sources_are_mixed_and_resumed(project: Project) -> None:
    write_rows(project.folder / "more chats.jsonl", chats(10, seed=1))
    mixture = "data.mixture={more chats.jsonl: 2, chats.jsonl: 0.5}"
    words = ("chats.jsonl", "more chats.jsonl", "--set", mixture, "--set", "data.eval_split=0", "--set", "checkpoint.every=2 steps")
    done = project.type("train", *words).expect(0)
    assert "chats.jsonl: 24 rows, 12 seen in an epoch (0.5 times each)" in done.err
    assert "more chats.jsonl: 10 rows, 20 seen in an epoch (2 times each)" in done.err
    assert max(project.run.checkpoints) == 8 and "/final chats.jsonl 'more chats.jsonl'" in done.out
    straight = learned(project)
    project.type("train", *words, at=[("llamahome.training.loop:train_step", 3, ["SIGINT"])]).expect(75)
    project.type("train-resume", "latest").expect(0)
    assert learned(project) == straight
    measured = project.type("train-eval", "output/training/final", "chats.jsonl", "more chats.jsonl", "--json").expect(0).json
    assert measured["rows"] == 34 and measured["data"] == ["chats.jsonl", "more chats.jsonl"]


def test_what_was_prepared_is_what_training_uses(project: Project) -> None:
    told = project.type("data", "prepare", "chats.jsonl", "--model", "tiny", "--json").expect(0).json
    assert told["rows"] == told["kept"] == 24 and (told["train_examples"], told["eval_examples"]) == (20, 4)
    folder = project.folder / told["folder"]
    assert folder.is_dir() and told["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    project.type("train", "chats.jsonl", *PREPARE).expect(0)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps and stores(project) == [folder.name]
    shown = project.type("data", "prepare", "chats.jsonl", "--model", "tiny").expect(0)
    assert "20 examples to train on, 4 held out" in shown.out and told["folder"] in shown.out


def test_the_next_command_of_prepare_trains_on_what_it_prepared_for_that_model(project: Project) -> None:
    shutil.copytree(project.folder / "data/models/base/tiny", project.folder / "other model")
    (project.folder / "my settings.yaml").write_text("data:\n  max_length: 80\n")
    own = ("--model", "other model", "--config", "my settings.yaml", "--set", "data.train_on=last")
    told = project.type("data", "prepare", "chats.jsonl", *own).expect(0).out
    words = shlex.split(told.partition("next: llamahome ")[2])
    assert stores(project) == [name for name in stores(project) if name in told]
    before = stores(project)
    project.type(*words, "--max-steps", "1").expect(0)
    assert stores(project) == before
    config = project.run.root.joinpath("config.yaml").read_text()
    assert "name: other model  # --model" in config and "max_length: 80  #" in config and "train_on: last  # --set" in config


def test_a_step_whose_only_row_was_dropped_changes_nothing(rough: Project) -> None:
    words = ("chats.jsonl", "--set", "training.batch_size=1", "--set", "data.max_length=48", "--set", "data.eval_split=0", *ROUGH)
    rough.type("train", *words, "--epochs", "1").expect(0)
    losses, norms = rough.run.by_step("train/loss"), rough.run.by_step("train/grad_norm")
    empty = [step for step, norm in norms.items() if norm == 0]
    assert len(losses) == 40 and len(empty) >= 3 and all(map(math.isfinite, losses.values()))
    assert not [line for line in rough.run.lines("events") if line["kind"] == "bad-step"]


@pytest.mark.slow
def test_two_processes_stream_like_one(rough: Project) -> None:
    """Every process tokenizes the whole step, so that all share it out alike."""
    words = ("train", *LONG, "--world-size", "2")
    rough.shell(*words, *STREAM).expect(0)
    one = learned(rough)
    rough.shell(*words, *PREPARE).expect(0)
    assert learned(rough) == one


def test_a_plan_of_streamed_rows_is_the_plan_of_prepared_ones(project: Project) -> None:
    streamed, prepared = (project.type("plan", "chats.jsonl", "--json", *mode).expect(0).json for mode in (STREAM, PREPARE))
    assert streamed["steps"] == prepared["steps"] and streamed["batch_size"] == prepared["batch_size"]
    (project.folder / "reward.py").write_text("def reward(prompt, answer, row):\n    return float(len(answer))\n")
    for words in (("--max-steps", "3"), ("--set", "training.objective=grpo", "--reward", "reward.py:reward")):
        project.type("plan", "chats.jsonl", *STREAM, *words).expect(0)


def test_what_needs_every_row_trains_where_none_can_be_written(project: Project) -> None:
    write_rows(project.folder / "pairs.jsonl", pairs(24))
    taken = project.folder / STORES
    taken.parent.mkdir(parents=True, exist_ok=True)
    taken.write_text("a file where a folder should be")
    words = ("pairs.jsonl", "--max-steps", "1", "--set", "training.objective=dpo", "--set", "evaluation.sample_prompts=0")
    assert "they are kept in memory" in project.type("train", *words).expect(0).err
    refused = project.type("data", "prepare", "chats.jsonl").expect(4)
    assert refused.codes == ["data.store-unwritable"]
    project.type(*shlex.split(refused.helps[0].split("   ")[0])[1:], "--max-steps", "1").expect(0)
