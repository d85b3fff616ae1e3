"""Ctrl-C in every phase of a run: once saves and exits 75, twice leaves with 130, and what stands under a final name is whole."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tests.support.projects import Answer, Project

from llamahome.checkpoint import manifest

PHASES = {
    "settings are checked": ("llamahome.pipeline:check_config", 1),
    "rows are read": ("llamahome.data_limits:prepare", 1),
    "the model is loaded": ("llamahome.training.loaded_model:load_model", 1),
    "the run's folder is made": ("llamahome.run_folder:create_run", 1),
    "the untrained model is evaluated": ("llamahome.training.evaluate:evaluate", 1),
    "a step is done": ("llamahome.training.loop:train_step", 2),
    "the model is evaluated in between": ("llamahome.training.evaluate:evaluate", 2),
    "a checkpoint is written": ("llamahome.checkpoint.manifest:seal", 1),
    "a checkpoint is renamed": ("llamahome.checkpoint.collective_save:durable.replace_folder", 1),
    "old checkpoints are removed": ("llamahome.saving:retention.apply", 1),
    "the last checkpoint is written": ("llamahome.checkpoint.manifest:seal", 3),
    "the final model is written": ("llamahome.saving:write_model", 4),
    "the final model is renamed": ("llamahome.checkpoint.store:durable.replace_folder", 4),
}
FEW = ("settings are checked", "a step is done", "a checkpoint is written")
NOBODY_LISTENS = ("settings are checked",)
NO_STEP_FOLLOWS = ("the last checkpoint is written", "the final model is written", "the final model is renamed")
OFTEN = ("chats.jsonl", "--set", "checkpoint.every=2 steps", "--set", "evaluation.every=2 steps", "--set", "checkpoint.keep_best=0")
WORDS = (*OFTEN, "--set", "checkpoint.async=false")
"""5 steps; checkpoints after 2, 4 and 5, in the loop, so that a phase has its place."""


@pytest.fixture(scope="module")
def straight(make_project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    project = make_project(tmp_path_factory.mktemp("straight") / "project")
    project.type("train", *WORDS).expect(0)
    assert project.run.checkpoints == [4, 5]
    return project.run.weights()


def everything_is_whole(project: Project) -> None:
    """Whatever stands under the name of a checkpoint or of the final model is complete."""
    for root in (project.folder / "output/runs").glob("*"):
        for checkpoint in root.glob("checkpoint-*"):
            assert checkpoint.name.endswith(".tmp") or manifest.verify(checkpoint) == []
        final = root / "final"
        names = {path.name for path in final.iterdir()} if final.exists() else set()
        assert not names or {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names


def goes_on_to_the_same_end(project: Project, straight: dict[str, bytes]) -> Answer:
    """`train-resume latest` where there is a checkpoint, the same `train` again where there is none."""
    has_checkpoint = any((project.folder / "output/runs").glob("*/checkpoint-*[0-9]/MANIFEST.json"))
    answer = project.type(*(("train-resume", "latest") if has_checkpoint else ("train", *WORDS))).expect(0)
    assert project.run.weights() == straight
    assert not list(project.run.root.glob("*.tmp")) and not list(project.run.root.glob(".trash*"))
    return answer


@pytest.mark.parametrize("phase", [pytest.param(phase, marks=[pytest.mark.medium] * (phase not in FEW)) for phase in PHASES])
def test_the_first_ctrl_c_saves_and_says_how_to_go_on(project: Project, straight: dict[str, bytes], phase: str) -> None:
    answer = project.type("train", *WORDS, at=[(*PHASES[phase], ["SIGINT"])])
    if phase in NOBODY_LISTENS:
        assert answer.status == 130 and "left at once" in answer.err and not project.runs()
    elif phase in NO_STEP_FOLLOWS:
        answer.expect(0)
    else:
        answer.expect(75)
        assert "with a checkpoint" in answer.err and "stopped[run.stopped]" in answer.err
        assert answer.helps == [f"llamahome train-resume output/runs/{project.runs()[0]}"]
    assert "Traceback" not in answer.err
    everything_is_whole(project)
    goes_on_to_the_same_end(project, straight)
    assert list(project.run.by_step("train/loss")) == [1, 2, 3, 4, 5]


@pytest.mark.medium
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase not in NOBODY_LISTENS])
def test_the_second_ctrl_c_leaves_at_once_and_nothing_is_half_written(project: Project, straight: dict[str, bytes], phase: str) -> None:
    answer = project.type("train", *WORDS, at=[(*PHASES[phase], ["SIGINT", "SIGINT"])])
    assert answer.status == 130 and "left at once" in answer.err and "Traceback" not in answer.err
    everything_is_whole(project)
    goes_on_to_the_same_end(project, straight)


@pytest.mark.medium
@pytest.mark.parametrize("phase", ["rows are read", "the model is loaded", "a step is done", "a checkpoint is written"])
def test_a_resumed_run_listens_too(project: Project, straight: dict[str, bytes], phase: str) -> None:
    project.type("train", *WORDS, at=[("llamahome.training.loop:train_step", 1, ["SIGINT"])]).expect(75)
    project.type("train-resume", "latest", at=[(*PHASES[phase], ["SIGINT"])]).expect(75)
    goes_on_to_the_same_end(project, straight)


def test_sigterm_is_a_ctrl_c(project: Project, straight: dict[str, bytes]) -> None:
    project.type("train", *WORDS, at=[("llamahome.training.loop:train_step", 2, ["SIGTERM"])]).expect(75)
    goes_on_to_the_same_end(project, straight)


@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_ctrl_c_while_libraries_are_imported_leaves_without_a_word_of_python(project: Project, seconds: float) -> None:
    before = project.files()
    with project.start("train", "chats.jsonl") as process:
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (75, 130) and "Traceback" not in err
    if process.returncode == 130:
        assert "left at once" in err and project.files() == before


def test_ctrl_c_in_a_reading_command_leaves(project: Project) -> None:
    answer = project.type("train-eval", "tiny", "chats.jsonl", at=[("llamahome.measuring:_measure", 1, ["SIGINT"])])
    assert answer.status == 130 and "Traceback" not in answer.err
    answer = project.type("chat", "tiny", "--prompt", "hello", at=[("llamahome.conversation:generate", 1, ["SIGINT"])])
    assert answer.status == 130 and "Traceback" not in answer.err


@pytest.mark.medium
def test_a_stop_while_the_starter_is_fetched_leaves_nothing(project: Project, tmp_path: Path) -> None:
    """pip gets the Ctrl-C of the terminal as well and fails: here it fails because its index is an empty folder."""
    (tmp_path / "empty").mkdir()
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "empty")}
    words = ("train", "chats.jsonl", "--model", "smollm2-135m-instruct")
    answer = project.type(*words, at=[("llamahome.conversation:find_model", 1, ["SIGINT"])], **index)
    assert answer.status == 130 and "run.left-at-once" in answer.err
    assert not project.runs() and not list((project.folder / "data/models/base").glob(".fetch-*"))
    answer = project.type(*words, **index).expect(4)
    assert answer.codes == ["machine.download-failed"] and "Traceback" not in answer.err


BESIDE = (*OFTEN, "--epochs", "4", "--set", "checkpoint.keep_last=100")
"""20 steps; a checkpoint after every second one, written while the next steps are done."""
WRITING = (
    "llamahome.checkpoint.manifest:seal",
    "llamahome.checkpoint.collective_save:durable.replace_folder",
    "llamahome.saving:retention.apply",
)


@pytest.fixture(scope="module")
def course(make_project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Undisturbed, and every checkpoint written in the loop."""
    project = make_project(tmp_path_factory.mktemp("course") / "project")
    project.type("train", *BESIDE, "--set", "checkpoint.async=false").expect(0)
    assert project.run.checkpoints == list(range(2, 21, 2))
    return project


def content(checkpoint: Path) -> dict[str, bytes]:
    """What a checkpoint holds, but for clocks, the run's name and the settings."""
    tensors = {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*.safetensors")}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return {**tensors, "state": json.dumps({**state, "elapsed_s": 0}, sort_keys=True).encode()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpoints_of_two_processes_written_beside_the_training_are_those_written_in_the_loop(
    make_project, tmp_path: Path, method: str
) -> None:
    found = []
    for written in ("true", "false"):
        project = make_project(tmp_path / written / "project")
        words = (*BESIDE, "--method", method, "--set", f"checkpoint.async={written}", "--world-size", "2")
        project.shell("train", *words).expect(0)
        assert all(manifest.verify(project.run.root / f"checkpoint-{step}") == [] for step in project.run.checkpoints)
        found.append({step: content(project.run.root / f"checkpoint-{step}") for step in project.run.checkpoints})
        why = [event["why"] for event in project.run.lines("events") if event["kind"] == "saves-in-the-loop"]
        assert why == []
    assert found[0] == found[1] and len(found[0]) == 10


@pytest.mark.medium
@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpoints_written_beside_the_training_are_those_written_in_the_loop(make_project, tmp_path: Path, method: str) -> None:
    found = []
    for written in ("true", "false"):
        project = make_project(tmp_path / written / "project")
        project.type("train", *BESIDE, "--method", method, "--set", f"checkpoint.async={written}").expect(0)
        assert all(manifest.verify(project.run.root / f"checkpoint-{step}") == [] for step in project.run.checkpoints)
        found.append({step: content(project.run.root / f"checkpoint-{step}") for step in project.run.checkpoints})
        assert "saves-in-the-loop" not in [event["kind"] for event in project.run.lines("events")]
    assert found[0] == found[1] and len(found[0]) == 10 and all(len(each) == 3 for each in found[0].values())


@pytest.mark.medium
@pytest.mark.parametrize(
    ("signals", "place"),
    [
        pytest.param(signals, place, marks=[] if place == "llamahome.checkpoint.manifest:seal" and len(signals) == 1 else pytest.mark.slow)
        for signals in (["SIGTERM"], ["SIGINT", "SIGTERM"], ["SIGKILL"])
        for place in WRITING
    ],
)
def test_a_signal_while_a_checkpoint_is_written_beside_the_training_harms_nothing(
    project: Project, course: Project, place: str, signals: list[str]
) -> None:
    answer = project.type("train", *BESIDE, at=[(place, 3, signals)])
    assert answer.status == {"SIGTERM": 75, "SIGINT": 130, "SIGKILL": -signal.SIGKILL}[signals[0]] and "Traceback" not in answer.err
    everything_is_whole(project)
    stands = project.run.checkpoints
    assert len(stands) >= (4 if signals == ["SIGTERM"] else 2)
    project.type("train-resume", "latest").expect(0)
    assert project.run.weights() == course.run.weights() and not list(project.run.root.glob("*.tmp"))
