"""`llamahome sweep` as it is typed: table and files, the best as a command, ends and kills of every kind, pruning, and docs/Sweep.md."""

import csv
import json
import os
import random
import re
import shlex
import signal
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_readme import commands_of
from tests.support.projects import ROOT, Project, RunFiles, chats, pairs, wait_until, write_rows

from llamahome.monitoring.resources import free_memory_bytes

RATES = "training.learning_rate=1e-3,1e-2"
SIX = (
    "sweep",
    "chats.jsonl",
    "--max-steps",
    "40",
    "--set",
    "checkpoint.every=3 steps",
    "--set",
    "training.learning_rate=1e-3,1e-2,3e-2",
    "--set",
    "lora.rank=2,4",
)
CHANGING = ("seconds", "run_id")
"""Fields of a trial that are of one attempt and not of its result."""


def results(project: Project, folder: str) -> list[dict[str, Any]]:
    """The trials in sweep.json without times."""
    trials = json.loads((project.folder / folder / "sweep.json").read_text())["trials"]
    return [{key: value for key, value in trial.items() if key not in CHANGING} for trial in trials]


def trials_of(project: Project) -> list[int]:
    """Processes that train in the project."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, where = (path / "cmdline").read_bytes().split(b"\0"), (path / "cwd").readlink()
        except OSError:
            continue
        if where == project.folder and b"sweep" not in words and any(b"llamahome" in word for word in words):
            found.append(int(path.name))
    return found


def recorded(project: Project) -> int:
    """Lines of metrics of all runs of the project."""
    return sum(path.read_bytes().count(b"\n") for path in project.folder.glob("data/metrics/logs/*/metrics.jsonl"))


@pytest.mark.medium
def test_a_sweep_compares_its_runs_and_types_the_best(project: Project) -> None:
    before = project.type("train", "chats.jsonl", "--max-steps", "1").expect(0)
    newest = project.run.root.resolve()
    answer = project.type("sweep", "chats.jsonl", "--set", RATES, "--output", "mine", "--json").expect(0)
    result = answer.json
    assert result == json.loads((project.folder / "mine/sweep.json").read_text()) and result["state"] == "finished"
    losses = [trial["last_loss"] for trial in result["trials"]]
    assert losses == sorted(losses) and losses[0] < result["trials"][0]["first_loss"]
    rows = list(csv.DictReader((project.folder / "mine/sweep.csv").read_text().splitlines()))
    assert [float(row["last_loss"]) for row in rows] == losses
    assert {row["training.learning_rate"] for row in rows} == {"1e-3", "1e-2"}
    dots = list(ElementTree.parse(project.folder / "mine/sweep.svg").iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 2
    best = result["best"]["trial"]
    assert [path.parent.name for path in (project.folder / "mine/trials").glob("*/final")] == [best]
    assert project.run.root.resolve() == newest, before.err
    listed = project.type("runs", "list", "--json").expect(0)
    assert len(listed.json) == 1 and "2 runs of a sweep not shown, see the table of mine" in listed.err

    again = project.type("sweep", "chats.jsonl", "--set", RATES, "--output", "mine").expect(0)
    assert again.out.splitlines()[0].split()[:4] == ["training.learning_rate", "seed", "last", "best"]
    assert "trial " not in again.err, "nothing is left to run"
    project.type(*shlex.split(result["best"]["command"])[1:]).expect(0)
    assert project.run.by_step("eval/loss")[5] == losses[0]

    write_rows(project.folder / "chats.jsonl", chats(24, seed=1))
    refused = project.type("sweep", "chats.jsonl", "--set", RATES, "--output", "mine")
    assert refused.codes == ["sweep.other-data"] and "rows have changed" in refused.err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--set", "training.epochs=1,2", "--epochs", "2"), "sweep.key-twice"),
        (("--set", "lora.rank=2,4", "--num-nodes", "2"), "sweep.several-machines"),
        (("--set", "lora.rank=2,4", "--node-rank", "1"), "sweep.several-machines"),
        (("--set", "lora.rank=2,4", "--from-adapter", "nothing-here"), "model.not-found"),
        (("--set", "lora.rank=2,4", "--set", "data.eval_split=0"), "sweep.nothing-held-out"),
        (("--set", "lora.rank=2,4", "--set", "output.name=a"), "sweep.key-twice"),
        (("--set", "training.objective=dpo,ipo"), "sweep.losses-differ"),
        (("--set", "training.objective=dpo", "--set", "preference.length_normalized=true,false"), "sweep.losses-differ"),
        (("--set", "training.objective=sft,dpo"), "sweep.losses-differ"),
        (("--set", "lora.rank=2,4", "--world-size", "2", "--dry-run"), "sweep.no-plan"),
        (("--set", "lora.rank=2,4", "--output", "data"), "sweep.not-a-sweep"),
        (("--set", "lora.rank=2"), "sweep.one-run"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_starts(project: Project, words: tuple[str, ...], code: str) -> None:
    answer = project.type("sweep", "chats.jsonl", *words)
    assert code in answer.codes and answer.status == 2, answer.err
    assert not (project.folder / "output").exists()


@pytest.mark.slow
def test_constants_of_a_loss_are_ranked_by_what_does_not_depend_on_them(project: Project) -> None:
    write_rows(project.folder / "pairs.jsonl", pairs(24))
    words = ("sweep", "pairs.jsonl", "--set", "training.objective=dpo", "--set", "preference.beta=20,0.1,1", "--max-steps", "3")
    answer = project.type(*words, "--output", "mine").expect(0)
    assert "ranked by held-out pair accuracy" in answer.out.splitlines()[0]
    trials = json.loads((project.folder / "mine/sweep.json").read_text())["trials"]
    own = {trial["trial"]: RunFiles(project.folder, project.folder / "mine/trials" / trial["trial"]) for trial in trials}
    accuracies = {name: run.by_step("eval/pair_accuracy")[3] for name, run in own.items()}
    assert [trial["final_value"] for trial in trials] == [accuracies[trial["trial"]] for trial in trials]
    assert [trial["final_value"] for trial in trials] == sorted(accuracies.values(), reverse=True)
    assert {trial["ranked_by"] for trial in trials} == {"pair_accuracy"} and {trial["mean_loss"] for trial in trials} == {None}


@pytest.mark.medium
def test_a_dry_run_counts_the_runs_and_starts_none(project: Project) -> None:
    words = ("sweep", "chats.jsonl", "--set", RATES, "--seeds", "2", "--dry-run")
    plan = project.type(*words, "--json").expect(0).json
    assert plan["runs"] == 4 and [trial["steps"] for trial in plan["trials"]] == [5] * 4
    assert plan["seconds"] == pytest.approx(sum(trial["seconds"] for trial in plan["trials"]))
    shown = project.type(*words).expect(0)
    assert "4 runs, 1 at a time" in shown.out and len(set(shown.err.splitlines())) == len(shown.err.splitlines())
    assert not (project.folder / "output").exists()


@pytest.mark.medium
def test_as_many_runs_go_side_by_side_as_the_memory_holds(project: Project) -> None:
    """Each run needs what the planner counts and about 400 MiB for Python and its libraries; 90 % of the free memory may be used."""
    words, process, free = ("sweep", "chats.jsonl", "--set", RATES, "--dry-run", "--json"), 400 * 2**20, free_memory_bytes()
    seeds = free // (2 * process) + 1
    answer = project.type(*words, "--seeds", str(seeds), "--jobs", str(2 * seeds)).expect(0)
    needed, jobs = answer.json["trials"][0]["memory_bytes"] + process, answer.json["jobs"]
    assert answer.json["runs"] == 2 * seeds and f"--jobs {2 * seeds} is more than the memory holds: {jobs} run" in answer.err
    assert 0.5 * free < (jobs + 1) * needed and jobs * needed < 0.95 * max(free, free_memory_bytes()), "others use the memory, too"
    few = project.type(*words, "--seeds", "2", "--jobs", "2").expect(0)
    assert few.json["jobs"] == 2 and "more than the memory holds" not in few.err


@pytest.mark.slow
def test_a_sweep_stopped_and_killed_at_random_gives_the_same_table(make_project: Callable[[Path], Project], tmp_path: Path) -> None:
    words = (*SIX, "--output", "six", "--keep-all")
    undisturbed, project = make_project(tmp_path / "undisturbed"), make_project(tmp_path / "project")
    undisturbed.shell(*words, timeout=600).expect(0)
    source = random.Random(0)
    for killed in ("parent", "everybody", "parent", "SIGTERM to a trial", "SIGKILL to a trial", "everybody"):
        with project.start(*words) as process:
            lines = recorded(project) + source.randint(0, 60)
            wait_until(lambda lines=lines, process=process: recorded(project) > lines or process.poll() is not None, seconds=120)
            time.sleep(source.uniform(0, 0.5))
            found = trials_of(project)
            if "trial" not in killed:
                process.kill()
            for each in found if killed != "parent" else []:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGTERM if "SIGTERM" in killed else signal.SIGKILL)
            if "trial" in killed:  # the sweep goes on by itself, and a Ctrl-C ends it
                wait_until(lambda found=found, process=process: process.poll() is not None or set(trials_of(project)) - set(found))
                process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        wait_until(lambda: not trials_of(project))
        if "trial" in killed and process.returncode != 0:
            assert process.returncode == 75, err
            assert json.loads((project.folder / "six/sweep.json").read_text())["state"] == "stopped"
            assert shlex.split(re.findall(r"^help: (llamahome .*)$", err, flags=re.MULTILINE)[0])[1:] == list(words)
    project.shell(*words, timeout=600).expect(0)
    assert results(project, "six") == results(undisturbed, "six")


@pytest.mark.slow
def test_a_failing_run_is_a_row_with_its_reason_and_seeds_show_their_spread(project: Project) -> None:
    words = ("--set", "lora.target_modules=[q_proj],[nothing_proj]", "--seeds", "2", "--output", "mixed")
    answer = project.shell("sweep", "chats.jsonl", *words).expect(0)
    assert "standard deviation over 2 seeds" in answer.out and "error[lora.no-such-module]" in answer.out
    trials = results(project, "mixed")
    assert [trial["state"] for trial in trials] == ["finished"] * 2 + ["failed"] * 2
    losses = [trial["last_loss"] for trial in trials[:2]]
    assert trials[0]["mean_loss"] == pytest.approx(sum(losses) / 2)
    assert trials[0]["deviation"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)


@pytest.mark.slow
def test_what_does_not_learn_is_pruned_in_a_real_sweep_and_the_table_says_after_which_step(project: Project) -> None:
    words = ("--max-steps", "1000", "--set", "training.learning_rate=1e-3,8e-4,1e-9,1e-10", "--output", "pruned")
    answer = project.shell("sweep", "chats.jsonl", *words).expect(0)
    trials = {trial["values"]["training.learning_rate"]: trial for trial in results(project, "pruned")}
    for rate in ("1e-9", "1e-10"):
        assert trials[rate]["state"] == "pruned" and trials[rate]["step"] == 300, answer.err
        assert re.search(rf"^{rate} .*300/1000 .*pruned", answer.out, flags=re.MULTILINE), answer.out
    assert {trials[rate]["state"] for rate in ("1e-3", "8e-4")} == {"finished"}
    assert trials["1e-3"]["step"] == 1000
    again = project.type("sweep", "chats.jsonl", *words).expect(0)
    assert again.out == answer.out and "starts" not in again.err


@pytest.mark.slow
def test_runs_side_by_side_give_one_table_and_train_an_adapter_further(project: Project) -> None:
    project.type("train", "chats.jsonl", "--max-steps", "2").expect(0)
    words = ("sweep", "chats.jsonl", "--set", RATES, "--from-adapter", "latest", "--jobs", "2", "--output")
    first = project.shell(*words, "one").expect(0)
    assert "2 at a time" in first.err and "--from-adapter output/runs/" in first.err
    lineages = list((project.folder / "one/trials").glob("*/lineage.json"))
    assert len(lineages) == 2
    project.shell(*words, "two").expect(0)
    assert results(project, "one") == results(project, "two")


@pytest.mark.slow
def test_a_second_sweep_in_a_folder_where_one_runs_is_refused(project: Project) -> None:
    words = (*SIX, "--output", "six")
    with project.start(*words) as process:
        wait_until(lambda: trials_of(project))
        assert project.shell(*words).codes == ["sweep.running"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 75


def _another_rate(folder: Path) -> None:
    (folder / ".config/training_config.yaml").write_text((folder / ".config/training_config.yaml").read_text().replace("0.01", "0.02"))


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "sweep.not-a-sweep": lambda folder: (folder / "six/command.json").unlink(),
    "sweep.other-settings": _another_rate,
    "sweep.other-data": lambda folder: write_rows(folder / "chats.jsonl", chats(24, seed=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("code", FOLDERS)
def test_a_folder_that_does_not_fit_is_refused_and_the_one_in_the_help_is_free(project: Project, code: str) -> None:
    words = ("sweep", "chats.jsonl", "--set", "lora.rank=2,4", "--output")
    project.shell(*words, "six").expect(0)
    FOLDERS[code](project.folder)
    refused = project.type(*words, "six")
    assert refused.codes == [code] and refused.status == 2
    option, folder = shlex.split(refused.helps[0])
    assert option == "--output"
    project.shell(*words, folder).expect(0)


@pytest.mark.slow
@pytest.mark.parametrize("text", commands_of(ROOT / "docs/Sweep.md"))
def test_the_commands_of_the_page_do_what_it_says(project: Project, text: str) -> None:
    words = shlex.split(text)[1:]
    answer = project.shell(*words, "--max-steps", "1", "--set", "training.batch_size=2", LLAMAHOME_MODEL__NAME="tiny").expect(0)
    assert "the best:" in answer.out or "--dry-run" in words


@pytest.mark.parametrize("listed", [RATES, "data.eval_split=auto,1"], ids=["all", "one"])
def test_runs_of_which_one_would_hold_nothing_out_are_refused_before_the_first(project: Project, listed: str) -> None:
    write_rows(project.folder / "few.jsonl", [{"messages": chats(1)[0]["messages"], "id": number} for number in range(2)])
    words = ("sweep", "few.jsonl", "--max-steps", "1", "--output", "mine", "--set", listed)
    answer = project.type(*words, *(() if "eval_split" in listed else ("--set", "data.eval_split=auto"))).expect(2)
    assert answer.codes == ["sweep.nothing-held-out"] and answer.helps == ["--set data.eval_split=0.2"], answer.err
    assert ("with data.eval_split=auto: " in answer.err) == ("eval_split" in listed)
    assert not (project.folder / "mine").exists() and "starts" not in answer.err
