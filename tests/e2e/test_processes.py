"""Several processes train like one, and the two settings files of the specification are accepted verbatim and followed."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
from tests.support.processes import left_of
from tests.support.projects import Project, chats, wait_until, write_rows
from tests.support.workers import free_port

TRAINING = """\
# .config/training_config.yaml
training:
  batch_size: 32
  learning_rate: 5.0e-5
  epochs: 10
  gradient_checkpointing: true
  mixed_precision: true
"""
DISTRIBUTED = """\
# .config/distributed_config.yaml
distributed:
  backend: "nccl"
  world_size: 4
  num_nodes: 1
  sync_batch_norm: true
"""


def specified(project: Project) -> Project:
    """The project with the specification's two files in place of its own."""
    (project.folder / ".config/training_config.yaml").write_text(TRAINING)
    (project.folder / ".config/distributed_config.yaml").write_text(DISTRIBUTED)
    return project


def test_the_settings_files_of_the_specification_are_accepted_verbatim(project: Project) -> None:
    shown = specified(project).type("config", "show", "--json").expect(0).json
    expected = {
        "training.batch_size": 32,
        "training.learning_rate": 5e-5,
        "training.epochs": 10,
        "training.gradient_checkpointing": True,
        "training.mixed_precision": True,
        "distributed.backend": "nccl",
        "distributed.world_size": 4,
        "distributed.num_nodes": 1,
        "distributed.sync_batch_norm": True,
    }
    assert {key: value["value"] for key, value in shown.items() if value["origin"] != "default"} == expected
    assert all(shown[key]["origin"].startswith(".config/") for key in expected)
    project.type("config", "check").expect(0)


@pytest.mark.slow
def test_four_processes_follow_the_settings_files_of_the_specification(project: Project) -> None:
    answer = specified(project).shell("train", "chats.jsonl", "--model", "tiny", "--max-steps", "1").expect(0)
    assert answer.err.count("using gloo") == 1 and "4 processes" in answer.err
    assert answer.err.count("no batch normalization, nothing to do") == 1
    assert {path.name for path in (project.run.root / "logs").iterdir()} == {f"rank-{rank}.log" for rank in range(4)}
    (record,) = [line for line in project.run.lines("metrics") if "train/loss" in line]
    assert record["train/learning_rate"] == 5e-5
    text = (project.run.root / "config.yaml").read_text()
    assert "gradient_checkpointing: true" in text and "mixed_precision: true" in text and "batch_size: 32" in text


@pytest.mark.medium
def test_two_processes_give_the_losses_of_one_and_end(project: Project) -> None:
    words = ("chats.jsonl", "--set", "evaluation.every=2 steps")
    project.type("train", *words).expect(0)
    alone = {name: project.run.by_step(name) for name in ("train/loss", "eval/loss", "train/tokens", "train/grad_norm")}
    answer = project.shell("train", *words, "--world-size", "2").expect(0)
    for name, values in alone.items():
        losses = project.run.by_step(name)
        assert losses.keys() == values.keys()
        assert all(math.isclose(losses[step], value, rel_tol=1e-5) for step, value in values.items()), name
    assert answer.out.count("held-out loss") == 1 and answer.err.count("[1/3] data ...") <= 2, "only one process shows messages"
    assert left_of(project) == []
    assert json.loads((project.run.root / "checkpoint-5/trainer_state.json").read_text())["consumed"] == 20


@pytest.mark.slow
def test_ctrl_c_stops_every_process_and_one_process_can_resume(project: Project) -> None:
    words = ("chats.jsonl", "--epochs", "20")
    project.type("train", *words).expect(0)
    straight, first = project.run.by_step("train/loss"), project.run.root.resolve()
    with project.start("train", *words, "--world-size", "2") as process:
        wait_until(lambda: project.run.root.resolve() != first and steps_done(project), seconds=120)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 75) and "Traceback" not in err and left_of(project) == []
    if process.returncode == 0:
        pytest.skip("this machine finished all steps before the signal came")
    assert err.count("stopped[run.stopped]") == 1
    project.type("train-resume", "latest", "--set", "distributed.world_size=1").expect(0)
    found = project.run.by_step("train/loss")
    assert found.keys() == straight.keys() and all(math.isclose(found[step], loss, rel_tol=1e-3) for step, loss in straight.items())


@pytest.mark.slow
def test_bad_rows_are_reported_once_for_all_processes(project: Project) -> None:
    (project.folder / "rows.jsonl").write_text('{"messages": [{"role": "user"\n')
    answer = project.shell("train", "rows.jsonl", "--world-size", "2").expect(3)
    assert answer.codes == ["data.bad-json"] and left_of(project) == [] and not project.runs()


ABORTING = "import atexit, os, sys; atexit.register(os.abort); from llamahome.cli.app import main; main()"
"""torch's threads sometimes abort the shutdown of Python; this does it always."""


def side_by_side(project: Project, *commands: list[str], entry: tuple[str, ...] = ("-m", "llamahome")) -> list[tuple[int, str]]:
    """Exit status and stderr of processes started as by torchrun, one for each list of arguments; two per simulated machine."""
    started, port, loopback = [], free_port(), {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    for rank, words in enumerate(commands):
        place = {"RANK": rank, "WORLD_SIZE": len(commands), "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        variables = {**os.environ, **loopback, **{name: str(value) for name, value in place.items()}}
        process = subprocess.Popen([sys.executable, *entry, *words], cwd=project.folder, env=variables, stderr=subprocess.PIPE, text=True)
        started.append(process)
    try:
        outputs = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, err) for process, err in zip(started, outputs, strict=True)]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("words", "status"),
    [(["chats.jsonl", "--set", "distributed.strategy=shard"], 0), pytest.param(["broken.jsonl"], 3, marks=pytest.mark.slow)],
)
def test_a_process_of_a_group_exits_before_the_shutdown_of_python(project: Project, words: list[str], status: int) -> None:
    (project.folder / "broken.jsonl").write_text("{\n")
    words = ["train", *words, "--max-steps", "1"]
    first, second = side_by_side(project, words, words, entry=("-c", ABORTING))
    assert first[0] == status and second[0] >= 0, (first, second)
    if not status:
        assert project.run.checkpoints == [1] and (project.run.root / "final/adapter_model.safetensors").is_file()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("differing", "named"),
    [
        (["chats.jsonl", "--set", "training.seed=5"], "process 1 has training.seed 5, process 0 has 0"),
        pytest.param(["others.jsonl"], "data with the fingerprint", marks=pytest.mark.slow),
    ],
)
def test_processes_with_different_settings_or_data_end_with_one_error(project: Project, differing: list[str], named: str) -> None:
    write_rows(project.folder / "others.jsonl", chats(24, seed=1))
    first, second = side_by_side(project, ["train", "chats.jsonl"], ["train", *differing])
    assert first[0] > 0 and second[0] == 2
    assert "error[" not in first[1] and second[1].count("error[") == 1
    assert "error[distributed.ranks-differ]" in second[1] and named in second[1]
    assert left_of(project) == []


@pytest.mark.slow
def test_leftover_variables_of_another_launcher_lead_to_one_error(project: Project) -> None:
    join_timeout = ["--set", "distributed.join_timeout=1 s"]
    leftover = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank, code, run in (("0", "distributed.ranks-missing", project.shell), ("1", "distributed.machines-not-met", project.type)):
        answer = run("train", "chats.jsonl", *join_timeout, RANK=rank, LOCAL_RANK=rank, **leftover).expect(4)
        assert answer.codes == [code] and "unset RANK WORLD_SIZE" in answer.helps[0] and "[W" not in answer.err
    assert leftover["MASTER_PORT"] in answer.err


def test_variables_of_a_launch_that_is_over_are_ignored(project: Project) -> None:
    project.type("train", "chats.jsonl", "--max-steps", "1", LLAMAHOME_LAUNCH="/nowhere", LLAMAHOME_LAUNCHER_PID="1").expect(0)


def steps_done(project: Project) -> bool:
    path = project.folder / project.run.paths.metrics_dir / "metrics.jsonl"
    return path.is_file() and "train/loss" in path.read_text()
