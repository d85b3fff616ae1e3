import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.processes import alive
from tests.support.workers import ROOT, free_port, worker_environment

from llamahome.config.schema import DistributedConfig
from llamahome.distributed.launch import launch, needs_launch
from llamahome.errors import ConfigError, MachineError

SCRIPT = str(ROOT / "tests" / "support" / "launched.py")


WORDS = ["data/my file.jsonl", "--set", "a=$HOME ${local_rank} $$", "räven"]

DRIVER = """
import json, os, sys
from dataclasses import asdict
from llamahome.config.schema import DistributedConfig
from llamahome.distributed.launch import launch
from llamahome.errors import LlamaHomeError

def run(scene, folder, *words):
    before = dict(os.environ)
    try:
        config = DistributedConfig(world_size=2, max_restarts=0)
        result = {"status": launch([scene, folder, *words], config, entry=(sys.argv[1],)), "problems": []}
    except LlamaHomeError as error:
        kind = type(error).__name__
        result = {"status": error.exit_status, "kind": kind, "problems": [asdict(problem) for problem in error.problems]}
    return {**result, "environment restored": dict(os.environ) == before}

if len(sys.argv) == 4 and sys.argv[2] != "all":
    result = run(*sys.argv[2:])
    print(json.dumps(result))
    sys.exit(result["status"])
screen, results = os.dup(1), {}
for line in json.loads(sys.argv[3]):
    written = os.open(os.path.join(line[1], "screen-" + line[0]), os.O_WRONLY | os.O_CREAT)
    os.dup2(written, 1), os.dup2(written, 2)
    results[line[0]] = run(*line)
os.write(screen, json.dumps(results).encode())
"""
SCENES = ["first-shows-its-error", "second-ends-early", "killed", "data-error", "peer-killed"]


def _driver(*words):
    command = [sys.executable, "-c", DRIVER, SCRIPT, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=worker_environment())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("launch"))
    driver = _driver("all", json.dumps([["done", folder, *WORDS], *([scene, folder] for scene in SCENES)]))
    output, _ = driver.communicate(timeout=100)
    return {"folder": Path(folder), **json.loads(output)}


def _only(outcomes, scene):
    """Exit status, class of the error and its only problem, in a scene whose error only the launcher reports."""
    assert (outcomes["folder"] / f"screen-{scene}").read_text() == ""
    (problem,) = outcomes[scene]["problems"]
    return outcomes[scene]["status"], outcomes[scene]["kind"], problem


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({}, 0, 0),
        ({}, 1, 0),
        ({}, 4, 4),
        ({"world_size": 1}, 4, 0),
        ({"world_size": 4}, 0, 4),
        ({"num_nodes": 2}, 0, 1),
        ({"num_nodes": 2, "node_rank": 1}, 8, 8),
        ({"num_nodes": 2, "world_size": 8}, 0, 4),
        ({"num_nodes": "1:2", "world_size": 8}, 0, 4),
    ],
)
def test_the_number_of_processes_is_the_share_of_this_machine(settings, gpus, expected):
    assert needs_launch(DistributedConfig(**settings), {}, gpus=gpus) == expected


def test_under_an_outer_launcher_nothing_is_started():
    torchrun = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert needs_launch(DistributedConfig(world_size=3, num_nodes=2), torchrun, gpus=0) == 0
    assert needs_launch(DistributedConfig(world_size=4), {"WORLD_SIZE": "4"}, gpus=0) == 4


def test_all_sizes_that_do_not_fit_are_reported_with_sizes_that_do():
    with pytest.raises(ConfigError) as caught:
        needs_launch(DistributedConfig(world_size=7, num_nodes=2, node_rank=2), {}, gpus=0)
    assert {problem.code: problem.hint for problem in caught.value.problems} == {
        "distributed.node-rank-too-large": "--node-rank 0 to 1, or --num-nodes 3",
        "distributed.world-size-not-divisible": "--world-size 6 or 8",
    }
    with pytest.raises(ConfigError) as caught:
        needs_launch(DistributedConfig(world_size=8), {}, gpus=4)
    assert caught.value.problems[0].hint == "--world-size 4"
    with pytest.raises(ConfigError) as caught:
        needs_launch(DistributedConfig(world_size=1, num_nodes=2), {}, gpus=0)
    assert caught.value.problems[0].hint == "--world-size 2"


@pytest.mark.medium
def test_every_process_gets_the_arguments_unchanged(outcomes):
    assert outcomes["done"]["status"] == 0
    for rank in range(2):
        words = ["done", str(outcomes["folder"]), *WORDS]
        assert (outcomes["folder"] / f"done-{rank}").read_text() == " ".join(words)


@pytest.mark.medium
def test_the_environment_is_restored(outcomes):
    assert all(outcomes[scene]["environment restored"] for scene in ("done", *SCENES))


@pytest.mark.medium
def test_the_exit_status_of_process_0_is_returned_if_it_showed_its_error_itself(outcomes):
    assert outcomes["first-shows-its-error"]["status"] == 3 and outcomes["first-shows-its-error"]["problems"] == []
    assert (outcomes["folder"] / "screen-first-shows-its-error").read_text() == "error of process 0\n"


@pytest.mark.medium
def test_a_process_that_ends_early_is_reported_with_its_stderr_and_status(outcomes):
    status, kind, problem = _only(outcomes, "second-ends-early")
    assert (status, kind) == (3, "DataError")
    assert "process 1" in problem["message"] and "error[data.empty]: nothing there" in problem["excerpt"]


@pytest.mark.medium
def test_a_killed_process_ends_the_others_and_is_named(outcomes):
    status, kind, problem = _only(outcomes, "killed")
    assert (status, kind, problem["code"]) == (4, "MachineError", "distributed.process-killed")
    assert "process 1 was killed by SIGKILL" in problem["message"]


@pytest.mark.medium
def test_the_error_of_the_first_failed_process_is_raised_unchanged(outcomes):
    status, kind, problem = _only(outcomes, "data-error")
    assert (status, kind) == (3, "DataError")
    assert (problem["code"], problem["where"], problem["hint"]) == ("data.bad-json", "x.jsonl:3", "llamahome data check x.jsonl")


@pytest.mark.medium
def test_a_killed_process_is_the_cause_not_the_lost_connection_of_its_peer(outcomes):
    assert _only(outcomes, "peer-killed")[2]["code"] == "distributed.process-killed"


def _start(scene, folder):
    driver = _driver(scene, str(folder))
    deadline = time.monotonic() + 50
    while not all((folder / f"pid-{rank}").exists() and (folder / f"pid-{rank}").read_text() for rank in range(2)):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return driver, [int((folder / f"pid-{rank}").read_text()) for rank in range(2)]


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_reaches_every_worker_once_and_they_save_and_end_with_75(tmp_path, number):
    driver, pids = _start("stop", tmp_path)
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=30)
    assert [problem["code"] for problem in json.loads(output)["problems"]] == ["run.stopped"]
    assert driver.returncode == 75
    assert (tmp_path / "saved").read_text() == f"signals [{int(number)}]"
    assert not any(alive(pid, within=5) for pid in pids)


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_launcher_and_remove_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    driver, pids = _start("stop", tmp_path)
    driver.kill()
    driver.communicate(timeout=30)
    assert not any(alive(pid, within=20) for pid in pids)
    assert (tmp_path / "saved").read_text().startswith("signals")
    assert not list((tmp_path / "temporary").glob("llamahome-launch-*"))


@pytest.mark.medium
def test_a_stop_before_anything_is_saved_ends_all_processes_at_once(tmp_path):
    driver, pids = _start("sleeps", tmp_path)
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=30)
    assert [problem["code"] for problem in json.loads(output)["problems"]] == ["run.left-at-once"]
    assert driver.returncode == 130
    assert not any(alive(pid, within=5) for pid in pids)


def test_a_taken_port_is_an_error_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError) as caught:
            launch(["done"], DistributedConfig(num_nodes=2, master_port=port), entry=(SCRIPT,))
    assert caught.value.problems[0].code == "distributed.port-taken"
    assert caught.value.problems[0].hint.startswith("--master-port ")


def test_a_machine_0_that_does_not_answer_is_one_error():
    with pytest.raises(MachineError) as caught:
        launch(["done"], DistributedConfig(num_nodes=2, node_rank=1, master_port=free_port(), join_timeout="1 s"), entry=(SCRIPT,))
    assert caught.value.problems[0].code == "distributed.machines-not-met"
    assert "within 1 s" in caught.value.problems[0].message


@pytest.mark.slow
def test_two_machines_form_one_group_and_process_0_is_on_machine_0(tmp_path):
    port = free_port()
    drivers = []
    for node in (1, 0):
        settings = f"world_size=4, num_nodes=2, node_rank={node}, master_port={port}, timeout='40 s'"
        command = [sys.executable, "-c", DRIVER.replace("world_size=2", settings), SCRIPT, "done", str(tmp_path)]
        drivers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=worker_environment()))
    for driver in drivers:
        assert json.loads(driver.communicate(timeout=90)[0])["status"] == 0
    assert [(tmp_path / f"node-{rank}").read_text() for rank in range(4)] == ["0", "0", "1", "1"]
