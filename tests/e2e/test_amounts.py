"""Passes and batch size that nobody set: the same however a run is started, written down, and never in the way of what somebody did set."""

import json
import re
from pathlib import Path

import pytest
from tests.support.projects import Project, chats, write_rows

AUTO = ("--set", "training.epochs=auto", "--set", "training.batch_size=auto")
SAID = re.compile(r"^(\d+) rows?: ([\d.]+) pass(?:es)?, (\d+) steps? of (\d+) rows?, because .+$", re.MULTILINE)


def numbers(told: str) -> tuple[str, ...]:
    """Rows, passes, steps and rows of a step, as the one line says them."""
    (found,) = SAID.findall(told)
    return tuple(found)


def saved(project: Project, folder: Path) -> list[str]:
    """The two lines of the settings that were written down."""
    return re.findall(r"^  (?:epochs|batch_size): .*$", (folder / "config.yaml").read_text(), flags=re.MULTILINE)


@pytest.mark.medium
def test_the_numbers_are_said_obeyed_and_written_down_and_a_resumed_run_keeps_them(project: Project) -> None:
    done = project.type("train", "chats.jsonl", *AUTO, "--set", "checkpoint.every=2 steps", "--set", "checkpoint.keep_last=100").expect(0)
    rows, passes, steps, batch = map(float, numbers(done.err))
    assert (rows, steps) == (20, len(project.run.by_step("train/loss"))) and steps == -(-rows * passes // batch)
    written = saved(project, project.run.root)
    assert all("  # auto " in line for line in written) and {float(line.split()[1]) for line in written} == {passes, batch}
    weights = project.run.weights()
    again = project.type("train-resume", "output/training/checkpoint-2").expect(0)
    assert not SAID.search(again.err), "nothing is left to choose"
    assert project.run.weights() == weights
    assert [line.replace("saved: ", "") for line in saved(project, project.run.root)] == written


@pytest.mark.slow
def test_streams_plans_and_several_processes_come_to_the_same_numbers(project: Project) -> None:
    first = numbers(project.type("plan", "chats.jsonl", *AUTO).expect(0).err)
    words = ("train", "chats.jsonl", *AUTO)
    assert numbers(project.type(*words).expect(0).err) == first
    assert numbers(project.type(*words, "--set", "data.streaming=true").expect(0).err) == first
    two = project.shell(*words, "--world-size", "2").expect(0)
    assert numbers(two.err) == first
    assert len(project.run.by_step("train/loss")) == int(first[2])
    few = project.shell("train", "chats.jsonl", "--set", "training.batch_size=auto", "--epochs", "1", "--world-size", "2").expect(0)
    assert numbers(few.err) == ("20", "1", "20", "1")
    assert "1 of 2 processes have nothing to do in each step; --set training.batch_size=2 gives each of them a row" in few.err


def test_the_plan_holds_the_numbers(project: Project) -> None:
    done = project.type("plan", "chats.jsonl", *AUTO, "--json").expect(0)
    rows, passes, steps, batch = map(float, numbers(done.err))
    told = done.json
    assert (told["rows"], told["epochs"], told["steps"], told["batch_size"]) == (rows, passes, steps, batch)


@pytest.mark.parametrize(
    ("words", "passes", "steps", "batch"),
    [
        (("training.epochs=3",), "3", None, None),
        (("training.batch_size=7",), None, None, "7"),
        (("training.max_steps=9",), None, "9", None),
        (("training.max_steps=9", "training.batch_size=7"), None, "9", "7"),
        (("training.max_steps=9", "training.epochs=3"), None, "9", None),
    ],
)
def test_what_somebody_set_is_obeyed_and_the_rest_adapts(
    project: Project, words: tuple[str, ...], passes: str | None, steps: str | None, batch: str | None
) -> None:
    typed = [each for word in words for each in ("--set", word)]
    done = project.type("plan", "chats.jsonl", *AUTO, *typed, "--json").expect(0)
    told = numbers(done.err)
    wanted = (passes, steps, batch)
    assert all(found == wish for found, wish in zip(told[1:], wanted, strict=True) if wish is not None)
    assert int(told[2]) - 1 < int(told[0]) * float(told[1]) / int(told[3]) <= int(told[2]) + 0.1, "the passes are those of these steps"
    assert done.json["steps"] == int(told[2]) and done.json["batch_size"] == int(told[3])


def test_nothing_is_said_where_both_are_set(project: Project) -> None:
    done = project.type("plan", "chats.jsonl", "--set", "training.epochs=3", "--set", "training.batch_size=5", "--json").expect(0)
    assert not SAID.search(done.err) and (done.json["epochs"], done.json["steps"], done.json["batch_size"]) == (3, 12, 5)


def test_one_row_is_enough(project: Project) -> None:
    write_rows(project.folder / "one.jsonl", chats(1))
    done = project.type("train", "one.jsonl", *AUTO, "--set", "data.eval_split=0").expect(0)
    assert numbers(done.err)[0] == "1" and json.loads((project.run.root / "final/adapter_config.json").read_text())["r"] == 16
