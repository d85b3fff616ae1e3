"""`llamahome train-resume`: a run that was stopped, killed or rewound ends with the same bytes as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.projects import Project, RunFiles, Strike, chats, wait_until, write_rows

KINDS = {
    "lora": (),
    "lora-dropout": ("--set", "lora.dropout=0.2"),
    "full": ("--method", "full", "--set", "training.learning_rate=0.001"),
}
LONG = ("chats.jsonl", "--epochs", "1.6", "--set", "checkpoint.every=2 steps", "--set", "evaluation.every=3 steps")
"""8 steps of 4 rows over 20: the fifth ends the first epoch."""


def after_step(step: int, *signals: str) -> list[Strike]:
    """Signals in the middle of `step`."""
    return [("llamahome.training.loop:train_step", step, list(signals))]


@dataclass(frozen=True)
class Course:
    """What a run learned, in bytes and numbers."""

    final: dict[str, bytes]
    losses: dict[int, float]
    evaluations: dict[int, float]
    tokens: dict[int, float]
    norms: dict[int, float]

    @classmethod
    def of(cls, run: RunFiles) -> "Course":
        names = ("train/loss", "eval/loss", "train/tokens", "train/grad_norm")
        return cls(run.weights(), *(run.by_step(name) for name in names))


@pytest.fixture(scope="module")
def straight(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Course]:
    """The uninterrupted run of each kind."""
    courses = {}
    for kind, words in KINDS.items():
        project = make_project(tmp_path_factory.mktemp("straight") / kind)
        project.type("train", *LONG, *words).expect(0)
        courses[kind] = Course.of(project.run)
        assert list(courses[kind].losses) == [1, 2, 3, 4, 5, 6, 7, 8] and list(courses[kind].evaluations) == [0, 3, 6, 8]
    return courses


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.medium) for kind in KINDS if kind != "lora")])
def test_a_run_stopped_in_mid_epoch_ends_as_if_it_had_not_been(project: Project, straight: dict[str, Course], kind: str) -> None:
    stopped = project.type("train", *LONG, *KINDS[kind], at=after_step(3, "SIGINT")).expect(75)
    (run_id,) = project.runs()
    assert f"stopped[run.stopped]: stopped after step 3 of 8; output/runs/{run_id}/checkpoint-3 is complete" in stopped.err
    assert stopped.helps == [f"llamahome train-resume output/runs/{run_id}"]
    assert project.run.checkpoints == [2, 3] and not (project.run.root / "final").exists()
    resumed = project.type(*stopped.helps[0].split()[1:]).expect(0)
    assert Course.of(project.run) == straight[kind]
    assert f"saved=output/runs/{run_id}/checkpoint-8" in resumed.err
    assert "held-out loss" in resumed.out, "the untrained model's evaluation is remembered"


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["lora-dropout", "full"])
def test_a_killed_run_ends_as_if_it_had_not_been(project: Project, straight: dict[str, Course], kind: str) -> None:
    assert project.type("train", *LONG, *KINDS[kind], at=after_step(6, "SIGKILL")).status == -signal.SIGKILL
    newest = project.run.checkpoints[-1]
    assert newest in (3, 4), "the save after step 4 waits for the one before, and may be under way"
    assert project.run.by_step("train/loss").keys() == {1, 2, 3, 4, 5}
    project.type("train-resume", "latest").expect(0)
    assert Course.of(project.run) == straight[kind]
    redone = [line["step"] for line in project.run.lines("superseded") if "train/loss" in line]
    assert redone == list(range(newest + 1, 6)), "what the killed process did after its checkpoint"


@pytest.mark.medium
def test_any_name_of_a_run_or_checkpoint_resumes_it(make_project, tmp_path: Path, straight: dict[str, Course]) -> None:
    first = make_project(tmp_path / "first")
    first.type("train", *LONG, at=after_step(3, "SIGTERM")).expect(75)
    (run_id,) = first.runs()
    for number, name in enumerate(("output/training/checkpoint-3", f"output/runs/{run_id}", run_id, "latest", "output/training")):
        project = Project(tmp_path / f"copy-{number}", first.prompt)
        shutil.copytree(first.folder, project.folder, symlinks=True)
        project.type("train-resume", name).expect(0)
        assert project.run.by_step("train/loss") == straight["lora"].losses


@pytest.mark.medium
def test_an_interruption_at_every_step_changes_nothing(project: Project, straight: dict[str, Course]) -> None:
    status = project.type("train", *LONG, at=after_step(1, "SIGINT")).status
    for _ in range(7):
        assert status == 75
        status = project.type("train-resume", "latest", at=after_step(1, "SIGUSR1")).status
    if status == 75:
        project.type("train-resume", "latest").expect(0)
    assert Course.of(project.run) == straight["lora"]


@pytest.mark.medium
def test_a_real_process_stops_at_ctrl_c_and_another_goes_on(project: Project, straight: dict[str, Course]) -> None:
    words = (*LONG, "--set", "training.micro_batch_tokens=32")
    with project.start("train", *words) as process:
        metrics = project.folder / "data/metrics/logs"
        wait_until(lambda: any("train/loss" in path.read_text() for path in metrics.glob("*/metrics.jsonl")))
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("this machine finished all steps before the signal came")
    assert process.returncode == 75 and "Traceback" not in err
    project.shell("train-resume", "latest").expect(0)
    losses = project.run.by_step("train/loss")
    assert losses.keys() == straight["lora"].losses.keys()
    assert all(abs(losses[step] - loss) < 1e-4 for step, loss in straight["lora"].losses.items())


def test_resuming_a_finished_run_leaves_it_as_it_is(project: Project, straight: dict[str, Course]) -> None:
    project.type("train", *LONG).expect(0)
    before = {path: content for path, content in project.files().items() if "checkpoint-" in path or "final" in path}
    again = project.type("train-resume", "latest").expect(0)
    after = project.files()
    assert {path: after[path] for path in before} == before
    assert Course.of(project.run) == straight["lora"]
    assert "finished after 8 steps" in again.out and "held-out loss" in again.out
    folder = f"output/runs/{project.runs()[0]}"
    assert f"nothing is left to do; to go on: llamahome train-resume {folder} --epochs" in again.err
    capped = project.type("train-resume", "latest", "--epochs", "50", "--max-steps", "8").expect(0)
    assert f"to go on: llamahome train-resume {folder} --max-steps 16" in capped.err


@pytest.mark.medium
def test_an_older_checkpoint_begins_another_course_with_one_record_per_step(project: Project, straight: dict[str, Course]) -> None:
    project.type("train", *LONG, "--set", "checkpoint.keep_last=9").expect(0)
    assert project.run.checkpoints == [2, 3, 4, 6, 8]
    project.type("train-resume", "output/training/checkpoint-4").expect(0)
    assert Course.of(project.run) == straight["lora"]


@pytest.mark.medium
def test_more_epochs_can_be_asked_for_at_resume(project: Project) -> None:
    project.type("train", "chats.jsonl").expect(0)
    project.type("train-resume", "latest", "--epochs", "2").expect(0)
    assert list(project.run.by_step("train/loss")) == list(range(1, 11))
    shown = project.type("runs", "show", "latest", "--json").expect(0).json
    assert shown["settings"]["training.epochs"] == 2 and shown["horizon"] == 10


@pytest.mark.medium
def test_a_longer_run_goes_on_from_its_rate_and_shows_both_rates_also_after_a_kill(project: Project) -> None:
    project.type("train", "chats.jsonl", "--set", "checkpoint.every=1 step", "--set", "checkpoint.keep_last=9").expect(0)
    longer = ("train-resume", "latest", "--epochs", "2")
    said = project.type(*longer).expect(0).err
    rates = project.run.by_step("train/learning_rate")
    assert "changed: training.epochs 1 -> 2" in said and "the run ends at step 10 instead of 5" in said
    assert f"learning rate {rates[5]:.2e} in step 5, {rates[6]:.2e} in step 6" in said and "replan would make it" in said
    assert rates[5] > rates[6] > rates[10] > 0
    course = Course.of(project.run)
    again = project.type("train-resume", "output/training/checkpoint-7").expect(0)
    assert "learning rate" not in again.err and Course.of(project.run) == course
    assert project.type("train-resume", "output/training/checkpoint-5", "--epochs", "2", at=after_step(3, "SIGKILL")).status < 0
    project.type("train-resume", "latest").expect(0)
    assert Course.of(project.run) == course and project.run.by_step("train/learning_rate") == rates


@pytest.mark.medium
def test_a_finished_run_is_told_a_command_that_teaches_it_more(project: Project) -> None:
    project.type("train", "chats.jsonl").expect(0)
    told = project.type("train-resume", "latest").expect(0).err
    command = told.partition("to go on: llamahome ")[2].splitlines()[0]
    assert "warning" not in project.type(*command.split()).expect(0).err
    rates = project.run.by_step("train/learning_rate")
    assert rates[6] > 3 * rates[5]


@pytest.mark.medium
def test_a_run_resumed_with_another_batch_size_still_ends_at_max_steps(project: Project) -> None:
    project.type("train", "chats.jsonl", "--max-steps", "2").expect(0)
    project.type("train-resume", "latest", "--set", "training.max_steps=4", "--set", "training.batch_size=3").expect(0)
    assert list(project.run.by_step("train/loss")) == [1, 2, 3, 4]
    assert project.run.by_step("train/learning_rate")[4] > 0


def test_one_can_talk_to_a_run_that_has_only_checkpoints(project: Project) -> None:
    project.type("train", "chats.jsonl", "--max-steps", "1", "--output", "mine").expect(0)
    shutil.rmtree(project.folder / "mine/final")
    project.type("chat", "mine", "--prompt", "hello", "--max-new-tokens", "2").expect(0)


@pytest.mark.medium
def test_changed_data_is_refused_unless_allowed_by_name(project: Project) -> None:
    project.type("train", *LONG, at=after_step(3, "SIGINT")).expect(75)
    write_rows(project.folder / "chats.jsonl", chats(24, seed=1))
    before = project.files()
    refused = project.type("train-resume", "latest").expect(7)
    assert refused.codes == ["checkpoint.data-changed"] and refused.helps == ["--allow-changed data"]
    assert project.files() == before
    project.type("train-resume", "latest", *refused.helps[0].split()).expect(0)
    assert list(project.run.by_step("train/loss")) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.medium
def test_a_changed_base_is_refused_unless_allowed_by_name(project: Project, make_project, tmp_path: Path) -> None:
    from tests.support.models import save_tiny

    project.type("train", *LONG, at=after_step(3, "SIGINT")).expect(75)
    save_tiny(project.folder / "data/models/base/tiny", seed=1)
    refused = project.type("train-resume", "latest").expect(7)
    assert refused.codes == ["checkpoint.base-changed"] and refused.helps == ["--allow-changed base"]
    project.type("train-resume", "latest", *refused.helps[0].split()).expect(0)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(project: Project, straight: dict[str, Course]) -> None:
    project.type("train", *LONG, at=after_step(3, "SIGINT")).expect(75)
    weights = project.run.root / "checkpoint-3/model/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused = project.type("train-resume", "output/training/checkpoint-3").expect(7)
    assert refused.codes == ["checkpoint.damaged"] and "adapter_model.safetensors" in refused.err
    assert refused.helps[-1].endswith("checkpoint-2")
    resumed = project.type("train-resume", "latest").expect(0)
    assert "warning: " in resumed.err and "checkpoint-3" in resumed.err
    assert Course.of(project.run) == straight["lora"]


def test_the_state_of_a_checkpoint_says_where_the_run_stands(project: Project) -> None:
    project.type("train", *LONG, at=after_step(3, "SIGINT")).expect(75)
    state = json.loads((project.run.root / "checkpoint-3/trainer_state.json").read_text())
    assert (state["step"], state["consumed"]) == (3, 12)
    assert project.run.lines("events")[-1]["kind"] == "stopped"


@pytest.mark.medium
def test_a_new_run_goes_on_from_an_old_one_and_leaves_it_as_it_is(project: Project, straight: dict[str, Course]) -> None:
    project.type("train", *LONG, "--set", "output.name=old", at=after_step(4, "SIGINT")).expect(75)
    (old,) = project.runs()
    root = project.run.root.resolve()
    before = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    told = project.type("train-resume", "old", "--output", "out/new").expect(0)
    assert "out/new/checkpoint-4: where the new run begins" in told.err
    assert Course.of(project.run).final == straight["lora"].final and list(project.run.by_step("train/loss")) == [5, 6, 7, 8]
    assert project.run.checkpoints[0] == 4 and project.run.checkpoints[-1] == 8
    assert {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()} == before
    project.type("train-resume", "old", "--output", "out/new").expect(2)
    project.type("train-resume", old, "--set", "output.name=second").expect(0)
    assert [run.split("-")[-1] for run in project.runs()] == ["old", "second"]


WATCHER = """
import os, sys

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            with open("environment-of-torch.txt", "w") as file:
                file.write(" ".join(sorted(name for name in ("GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY") if name in os.environ)))

sys.meta_path.insert(0, Watcher())
from llamahome.cli.app import main
main()
"""


@pytest.mark.medium
def test_a_resumed_run_sets_what_torch_reads_on_import_as_the_first_run_does(project: Project) -> None:
    """A reader of checkpoints that imports torch too early made resumed runs take twice the processor time next to busy processes."""
    variables = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY")}
    for words in (["train", "chats.jsonl", "--max-steps", "1"], ["train-resume", "latest", "--max-steps", "2"]):
        subprocess.run([sys.executable, "-c", WATCHER, *words], cwd=project.folder, env=variables, check=True, capture_output=True)
        assert (project.folder / "environment-of-torch.txt").read_text() == "GOMP_SPINCOUNT LRU_CACHE_CAPACITY"
