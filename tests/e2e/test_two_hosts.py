"""Two network namespaces with a cable between them stand for two hosts that share a disk."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from tests.support.projects import Project

pytestmark = pytest.mark.slow
ADDRESSES = ("10.79.0.1", "10.79.0.2")


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other; removed afterwards."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"llamahome-{os.getpid()}-{number}" for number in range(2)]
    try:
        if any(ip("netns", "add", name).returncode for name in names):
            pytest.skip("this machine does not allow network namespaces")
        ends = [["netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]]]
        made = ip("link", "add", "cable", *ends[0])
        assert made.returncode == 0, made.stderr
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start(project: Project, hosts: list[str], number: int, *words: str) -> subprocess.Popen:
    command = ["ip", "netns", "exec", hosts[number], sys.executable, "-m", "llamahome", "train-distributed", "chats.jsonl"]
    machines = ["--num-nodes", "2", "--node-rank", str(number), "--master-addr", ADDRESSES[0], "--world-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    return subprocess.Popen(
        [*command, *machines, *words], cwd=project.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """Exit status and stderr of each; what has not ended is killed with its children."""
    try:
        return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=seconds)]]
    finally:
        for process in processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.communicate()


def test_two_hosts_train_as_one_process_does(project: Project, hosts: list[str]) -> None:
    project.type("train", "chats.jsonl").expect(0)
    alone = project.run.by_step("train/loss")
    found = ended([start(project, hosts, number) for number in (1, 0)], 150)
    assert [status for status, _ in found] == [0, 0], found
    assert project.run.by_step("train/loss") == pytest.approx(alone, rel=1e-4)
