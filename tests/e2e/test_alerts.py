"""A training that goes wrong raises alerts while it runs, tells the user's command, and says what it says in its files too."""

import json
import shlex
from typing import Any

import pytest
from tests.support.curves import alerts_of
from tests.support.projects import Project

from llamahome.monitoring.episodes import Facts
from llamahome.monitoring.runs import numbers_of

WORDS = ("--set", "data.eval_split=10", "--set", "evaluation.every=10 steps")


def events(project: Project, kind: str) -> list[dict[str, Any]]:
    return [event for event in project.run.lines("events") if event["kind"] == kind]


def alerts(project: Project) -> set[str]:
    return {event["alert"] for event in events(project, "alert")}


@pytest.mark.medium
def test_a_healthy_run_raises_nothing_and_notifies_of_its_end_only(project: Project) -> None:
    done = project.type(
        "train", "chats.jsonl", *WORDS, "--set", f"monitoring.notify=cat >> {shlex.quote(str(project.folder / 'notes'))}"
    ).expect(0)
    assert alerts(project) - MACHINE == set(), events(project, "alert")
    notes = [json.loads(line) for line in (project.folder / "notes").read_text().splitlines()]
    steps = events(project, "finished")[0]["step"]
    assert [(note["event"], note["step"]) for note in notes if note.get("alert") not in MACHINE] == [("finished", steps)]
    assert notes[-1]["run"] == project.runs()[0]
    assert "warning" not in done.err
    assert events(project, "started")[0]["peak_flops"] > 0


MACHINE = {"memory", "disk", "swap", "throttled", "throughput", "data-wait"}
"""What the machine that tests may really have: other programs work on it."""


@pytest.mark.slow
def test_a_run_that_over_fits_says_so_while_it_runs(project: Project) -> None:
    words = ("--set", "training.learning_rate=0.02", "--epochs", "40")
    done = project.type("train", "chats.jsonl", *WORDS, *words).expect(0)
    (found,) = [event for event in events(project, "alert") if event["alert"] == "overfitting"]
    assert f"alert: step {found['step']}: {found['text']}; {found['help']}" in done.err
    assert (found["event"], found["kind"]) == ("alert", "alert")
    best = int(found["text"].split("at step ")[1].split()[0])
    losses = project.run.by_step("eval/loss")
    assert losses[best] == min(loss for step, loss in losses.items() if step <= found["step"])
    facts = Facts(run="latest", data="x", horizon=max(losses), learning_rate=0.02, slower_rate=0.01, max_grad_norm=1, micro_batch_tokens=1)
    again = alerts_of(numbers_of(project.run.lines("metrics")), facts)
    assert found["step"] in [alert.step for alert in again if alert.name == "overfitting"], "the file alone says the same"


@pytest.mark.medium
def test_a_run_that_diverges_raises_an_alert_and_notifies_of_its_failure(project: Project) -> None:
    out = shlex.quote(str(project.folder / "notes"))
    words = ("--set", "training.learning_rate=1e30", "--set", "training.max_grad_norm=null", "--set", f"monitoring.notify=cat >> {out}")
    failed = project.type("train", "chats.jsonl", *words, "--epochs", "5").expect(6)
    assert "loss-not-finite" in alerts(project)
    notes = [json.loads(line) for line in (project.folder / "notes").read_text().splitlines()]
    assert "alert" in {note["event"] for note in notes}
    (note,) = [note for note in notes if note["event"] == "failed"]
    assert note["text"] in failed.err and note["step"] > 0


@pytest.mark.parametrize(
    ("words", "status", "code", "said"),
    [
        (("--set", "monitoring.trackers=[wandbb]"), 2, "config.bad-value", "did you mean wandb?"),
        (("--set", "monitoring.trackers=[mlflow]"), 4, "machine.no-tracker", "pip install 'llamahome[mlflow]'"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_begins(
    project: Project, words: tuple[str, ...], status: int, code: str, said: str
) -> None:
    refused = project.type("train", "chats.jsonl", *words).expect(status)
    assert refused.codes == [code] and said in refused.err
    assert project.runs() == []


@pytest.mark.slow
def test_two_processes_tell_each_other_how_long_they_work_and_each_measures_itself(project: Project) -> None:
    project.shell("train", "chats.jsonl", "--world-size", "2", "--set", "monitoring.system_every=0.1 s").expect(0)
    lines = [line for line in project.run.lines("metrics") if "ranks/slowest" in line]
    assert len(lines) >= 2
    for line in lines:
        assert line["ranks/slowest"] in (0, 1) and 0 < line["ranks/median_s"] <= line["ranks/slowest_s"]
    first, other = project.run.lines("system"), project.run.lines("system-rank-1")
    assert {line["rank"] for line in first} == {0} and {line["rank"] for line in other} == {1}
    assert "system/ram" in first[-1] and "system/ram" not in other[-1]
    assert first[-1]["host"] == other[-1]["host"]
    (peak,) = [event for event in project.run.lines("events") if event["kind"] == "started"]
    assert peak["peak_flops"] > 0 and "2 processes" in peak["peak_is"]
    assert all(0 < line["speed/mfu"] < 1.2 for line in project.run.lines("metrics")[2:] if "speed/mfu" in line)
