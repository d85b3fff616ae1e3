"""A run that training.max_time ends is a finished one: its model is used, and each line that it prints works when it is typed."""

import re
import shlex

import pytest
from tests.support.projects import Project

WORDS = ("chats.jsonl", "--set", "evaluation.sample_prompts=0", "--set", "checkpoint.every=1000 steps")
CUT = re.compile(r"training\.max_time 1 s ended it at step (\d+) of 9,999, .* with --max-steps (\d+) it falls to zero there")


@pytest.mark.medium
def test_the_run_ends_with_its_model_and_goes_on_with_more_time(project: Project) -> None:
    limited = ("--max-steps", "9999", "--set", "training.max_time=1 s")
    planned = project.type("plan", *WORDS, *limited, "--json").expect(0).json
    done = project.type("train", *WORDS, *limited).expect(0)
    ((step, typed),) = CUT.findall(done.out)
    root, last = project.run.paths.root, int(step)
    assert step == typed and re.search(rf"^time is up after {last} steps?,", done.out, re.M)
    assert planned["seconds"] <= 1.0 and (planned["cut_short"] is not None) == (planned["seconds"] == 1.0)
    assert max(project.run.by_step("eval/loss")) == last and (root / f"checkpoint-{last}").is_dir() and (root / "final").is_dir()
    shown = project.type("runs", "show", "latest", "--json").expect(0).json
    assert (shown["state"], shown["ended_early"]) == ("finished", "time is up")
    assert f"finished, {last} of 9999 steps (time is up)" in project.type("runs", "show", "latest").expect(0).out
    assert "ended before its last planned step: time is up" in (root / "report.html").read_text(encoding="utf-8")

    over = project.type("train-resume", "latest").expect(0)
    (command,) = re.findall(r"training\.max_time 1 s is over; to go on: llamahome (.+)", over.err)
    assert f"time is up after {last} steps" in over.out
    project.type(*shlex.split(command)).expect(0)
    assert max(project.run.by_step("train/loss")) > last

    assert "max_time" not in project.type("train", *WORDS, "--max-steps", typed).expect(0).out


@pytest.mark.medium
def test_two_processes_end_after_the_same_step(project: Project) -> None:
    limited = ("--max-steps", "9999", "--set", "training.max_time=1 s", "--world-size", "2")
    done = project.type("train-distributed", *WORDS, *limited).expect(0)
    assert re.search(r"^time is up after \d+ steps?,", done.out, re.M) and (project.run.paths.root / "final").is_dir()
