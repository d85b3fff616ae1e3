"""Two network namespaces with a virtual cable act as hosts that share a disk; a host is lost, the cable is cut, a rank is given twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from tests.support.projects import Project, wait_until

import install

ADDRESSES = ("10.79.0.1", "10.79.0.2")
ROOT = Path(__file__).resolve().parents[2]
LONG = ("--epochs", "1000", "--set", "checkpoint.every=20 steps", "--set", "evaluation.every=1000 epochs", "--set", "data.eval_split=0")
"""Two minutes of quick steps, for tests that stop the run or limit it with --max-steps."""
LEFT_OVER = {"WORLD_SIZE": "7", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1", "LOCAL_RANK": "3", "TORCHELASTIC_RESTART_COUNT": "5"}


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@dataclass
class Hosts:
    """The names of two connected namespaces, and the processes started in them."""

    names: list[str]
    started: list[subprocess.Popen] = field(default_factory=list)

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def repair(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "up")

    def processes(self, number: int) -> list[psutil.Process]:
        """The processes of a host without zombies."""
        pids = [int(word) for word in ip("netns", "pids", self.names[number]).stdout.split()]
        return [each for each in map(_process, pids) if each is not None]

    def kill(self, number: int) -> None:
        """Kill all processes of the host at once, as a power failure would."""
        for each in self.processes(number):
            each.send_signal(signal.SIGSTOP)
        for each in self.processes(number):
            each.kill()

    def worker(self, number: int) -> psutil.Process:
        """A training process of a host: its parent is the launcher."""
        processes = self.processes(number)
        pids = {each.pid for each in processes}
        return next(each for each in processes if each.ppid() in pids)

    def command(self, project: Project, number: int, *words: str, **variables: str) -> subprocess.Popen:
        """Run `words` on that host, in the project's folder."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **LEFT_OVER, **variables}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *words], cwd=project.folder, env=environment, text=True, **streams
        )
        self.started.append(process)
        return process

    def start(self, project: Project, number: int, *words: str, nodes: str = "2", node: int | None = None) -> subprocess.Popen:
        """Run `llamahome train-distributed` on that host, with one process."""
        place = ["--node-rank", str(number if node is None else node), "--master-addr", ADDRESSES[0], "--world-size", "2"]
        command = [sys.executable, "-m", "llamahome", "train-distributed", "chats.jsonl", "--num-nodes", nodes, *place, *words]
        return self.command(project, number, *command)


def _process(pid: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts with a cable. At the end their processes are killed and both are removed."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    hosts = Hosts([f"llamahome-{os.getpid()}-{number}" for number in range(2)])
    try:
        if any(ip("netns", "add", name).returncode for name in hosts.names):
            pytest.skip("this machine does not allow network namespaces")
        cable = ip("link", "add", "cable", "netns", hosts.names[0], "type", "veth", "peer", "name", "cable", "netns", hosts.names[1])
        assert cable.returncode == 0, cable.stderr
        for name, address in zip(hosts.names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for number in range(2):
            for process in hosts.processes(number):
                process.kill()
        for launched in hosts.started:
            launched.communicate()
        for name in hosts.names:
            ip("netns", "del", name)


def ended(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """Exit status and stderr of each."""
    return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=seconds)]]


def training(project: Project, step: int = 40) -> bool:
    """Whether the newest run has a checkpoint of `step` or later."""
    return (project.folder / "output/training").exists() and bool(project.run.checkpoints) and project.run.checkpoints[-1] >= step


def events(project: Project) -> list[str]:
    return [line["kind"] for line in project.run.lines("events") if line["kind"] in ("started", "resumed", "finished", "stopped")]


def losses(project: Project) -> dict[int, float]:
    """The loss of each step; of a repeated step the last one."""
    return {line["step"]: line["train/loss"] for line in project.run.lines("metrics") if "train/loss" in line}


@pytest.mark.slow
def test_make_train_multi_node_on_two_hosts_trains_like_one_process(project: Project, hosts: Hosts) -> None:
    project.type("train", "chats.jsonl").expect(0)
    alone = project.run.by_step("train/loss")
    shutil.copytree(ROOT / "scripts", project.folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, project.folder)
    (project.folder / ".venv/bin").mkdir(parents=True)
    for name in ("python", "llamahome"):
        (project.folder / ".venv/bin" / name).symlink_to(Path(sys.executable).parent / name)
    (project.folder / ".venv/.llamahome-installed").write_text(install.expected_stamp(str(project.folder)))
    words = ("make", "train-multi-node", "EPOCHS=1", "NUM_NODES=2", f"MASTER_ADDR={ADDRESSES[0]}", "DATA_PATH=chats.jsonl")
    results = ended([hosts.command(project, number, *words, f"NODE_RANK={number}") for number in (1, 0)], 200)
    assert [status for status, _ in results] == [0, 0], results
    assert project.run.by_step("train/loss") == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_a_cable_that_is_cut_for_5_seconds_changes_nothing(project: Project, hosts: Hosts) -> None:
    machines = [hosts.start(project, number, *LONG, "--max-steps", "400") for number in range(2)]
    wait_until(lambda: training(project), seconds=120)
    hosts.cut()
    time.sleep(5)
    hosts.repair()
    results = ended(machines, 200)
    assert [status for status, _ in results] == [0, 0], results
    assert events(project) == ["started", "finished"] and "starting all processes again" not in results[0][1]


@pytest.mark.medium
def test_after_the_cable_is_cut_machine_0_goes_on_alone_and_the_other_ends(project: Project, hosts: Hosts) -> None:
    machines = [hosts.start(project, number, *LONG, "--max-steps", "200", nodes="1:2") for number in range(2)]
    wait_until(lambda: training(project), seconds=300)
    hosts.cut()
    cut_at = time.time()
    ((status, err),) = ended(machines[1:], 120)
    assert status == 4 and err.count("error[") == 1 and "error[distributed.contact-lost]" in err, err
    assert hosts.processes(1) == []
    ((status, err),) = ended(machines[:1], 400)
    assert status == 0 and "machine 1 did not answer for 12 s" in err, err
    assert events(project) == ["started", "resumed", "finished"] and hosts.processes(0) == []
    resumed = next(line["t"] for line in project.run.lines("events") if line["kind"] == "resumed")
    print(f"alone again {resumed - cut_at:.0f} s after the cut")
    assert sorted(losses(project)) == list(range(1, 201))


@pytest.mark.slow
def test_without_machine_0_the_other_machine_goes_on_alone_to_the_end(project: Project, hosts: Hosts) -> None:
    machines = [hosts.start(project, number, *LONG, "--max-steps", "200", nodes="1:2") for number in range(2)]
    wait_until(lambda: training(project), seconds=300)
    hosts.kill(0)
    lost_at = time.time()
    machines[0].wait(timeout=20)
    ((status, err),) = ended(machines[1:], 400)
    assert status == 0 and "machine 0 is lost: machine 1 goes on alone from the newest checkpoint" in err, err
    assert events(project) == ["started", "resumed", "finished"] and hosts.processes(1) == []
    resumed = next(line["t"] for line in project.run.lines("events") if line["kind"] == "resumed")
    print(f"machine 1 alone {resumed - lost_at:.0f} s after the loss of machine 0")
    assert sorted(losses(project)) == list(range(1, 201))


@pytest.mark.slow
def test_a_machine_that_comes_back_joins_the_next_round(project: Project, hosts: Hosts) -> None:
    first = hosts.start(project, 0, *LONG, nodes="1:2")
    hosts.start(project, 1, *LONG, nodes="1:2")
    wait_until(lambda: training(project), seconds=120)
    hosts.kill(1)
    wait_until(lambda: events(project) == ["started", "resumed"], seconds=90)
    steps = max(losses(project))
    wait_until(lambda: max(losses(project)) > steps + 20, seconds=60)
    again = hosts.start(project, 1, *LONG, nodes="1:2")
    wait_until(lambda: events(project).count("resumed") == 2, seconds=90)
    assert events(project) == ["started", "resumed", "stopped", "resumed"], "it saved before the other joined"
    wait_until(lambda: len(hosts.processes(1)) > 1, seconds=10)
    again.send_signal(signal.SIGTERM)
    results = ended([first, again], 90)
    assert [status for status, _ in results] == [75, 75], results
    assert "machine 1 joined: starting all processes again with 2 of 2 machines" in results[0][1]
    assert hosts.processes(0) == hosts.processes(1) == []


@pytest.mark.slow
def test_without_machine_0_the_other_ends_and_both_can_resume_later(project: Project, hosts: Hosts) -> None:
    machines = [hosts.start(project, number, *LONG) for number in range(2)]
    wait_until(lambda: training(project), seconds=120)
    hosts.kill(0)
    machines[0].wait(timeout=20)
    ((status, err),) = ended(machines[1:], 60)
    assert status == 4 and err.count("error[") == 1 and "error[distributed.contact-lost]" in err, err
    assert hosts.processes(1) == []
    words = [sys.executable, "-m", "llamahome", "train-resume", "latest", "--max-steps", "400"]
    again = [hosts.command(project, number, *words, "--set", f"distributed.node_rank={number}") for number in range(2)]
    results = ended(again, 200)
    assert [status for status, _ in results] == [0, 0], results
    assert events(project) == ["started", "resumed", "finished"] and sorted(losses(project)) == list(range(1, 401))


@pytest.mark.slow
def test_a_killed_process_of_the_other_machine_changes_no_weight(project: Project, hosts: Hosts) -> None:
    words = (*LONG, "--max-steps", "120")
    results = ended([hosts.start(project, number, *words) for number in range(2)], 200)
    assert [status for status, _ in results] == [0, 0], results
    undisturbed, first = project.run.weights(), project.run.root.resolve()
    machines = [hosts.start(project, number, *words) for number in range(2)]
    wait_until(lambda: project.run.root.resolve() != first and training(project), seconds=120)
    hosts.worker(1).kill()
    results = ended(machines, 200)
    assert [status for status, _ in results] == [0, 0], results
    assert all("on machine 1" not in err or "SIGKILL" in err for _, err in results)
    assert events(project) == ["started", "resumed", "finished"] and project.run.weights() == undisturbed


@pytest.mark.slow
def test_one_sigterm_to_a_process_of_the_other_machine_saves_once_and_ends_all(project: Project, hosts: Hosts) -> None:
    machines = [hosts.start(project, number, *LONG) for number in range(2)]
    wait_until(lambda: training(project), seconds=120)
    hosts.worker(1).terminate()
    results = ended(machines, 60)
    assert [status for status, _ in results] == [75, 75], results
    assert all(err.count("[run.stopped]") == 1 for _, err in results), results
    assert events(project) == ["started", "stopped"] and hosts.processes(0) == hosts.processes(1) == []
    state = json.loads((project.run.root / f"checkpoint-{project.run.checkpoints[-1]}/trainer_state.json").read_text())
    assert state["step"] == max(losses(project))


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_duplicate_node_rank_is_an_error_and_everything_ends(project: Project, hosts: Hosts, node: int) -> None:
    """Two machines 0; or a second machine 1 while the first one trains, which goes on."""
    begun = time.monotonic()
    if node == 0:
        machines = [hosts.start(project, number, "--set", "distributed.join_timeout=20 s", node=0) for number in range(2)]
        (first, _), (second, err) = ended(machines, 60)
        assert (first, second) == (4, 2) and "error[distributed.node-rank-twice]" in err
    else:
        machines = [hosts.start(project, number, *LONG) for number in range(2)]
        wait_until(lambda: training(project), seconds=120)
        begun = time.monotonic()
        ((status, err),) = ended([hosts.start(project, 0, *LONG, node=1)], 60)
        assert status == 2 and "error[distributed.node-rank-twice]" in err
        machines[0].send_signal(signal.SIGTERM)
        assert [status for status, _ in ended(machines, 60)] == [75, 75]
    assert time.monotonic() - begun < 110 and hosts.processes(0) == hosts.processes(1) == []
