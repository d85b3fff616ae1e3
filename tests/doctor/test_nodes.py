"""Machines that meet: in threads of one process, and on two hosts with a cable, which are network namespaces."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from tests.support.sources import ROOT

from llamahome.doctor.nodes import Meeting, Place, hold_meeting

ADDRESSES = ("10.77.9.1", "10.77.9.2")


def meet(*ranks: int, nodes: int, seconds: float = 10.0, strangers: int = 0, last_when_one_is_done: bool = False) -> list[Meeting]:
    """The machine numbered `ranks[-1]` may start when another one has been turned away, so that all others have come before it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(len(ranks)) as threads:
        started = []
        for number, rank in enumerate(ranks, start=1):
            if last_when_one_is_done and number == len(ranks):
                wait(started, timeout=60, return_when=FIRST_COMPLETED)
            started.append(threads.submit(hold_meeting, Place("127.0.0.1", port, rank, nodes, nodes, seconds)))
        for _ in range(strangers):
            _shout(port)
        return [each.result(timeout=60) for each in started]


def _shout(port: int) -> None:
    for _ in range(200):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                connection.recv(100)
            return
        except ConnectionRefusedError:
            continue


def test_three_machines_meet_and_all_know_all_links() -> None:
    first, *others = meet(0, 1, 2, nodes=3)
    assert first.trouble is None and [link.rank for link in first.links] == [1, 2]
    assert all(link.open_ports and link.sent > 0 and link.received > 0 and link.latency_s > 0 for link in first.links)
    assert all(other.links == first.links for other in others)


def test_a_machine_that_comes_twice_is_told_so_and_the_meeting_goes_on() -> None:
    meetings = meet(0, 1, 1, 2, nodes=3, seconds=30.0, last_when_one_is_done=True)
    assert sorted(meeting.trouble or "" for meeting in meetings) == ["", "", "", "twice"]
    assert meetings[0].twice == (1,) and [link.rank for link in meetings[0].links] == [1, 2]


def test_other_programs_are_ignored_and_counted() -> None:
    meetings = meet(0, 1, nodes=2, strangers=1)
    assert meetings[0].strangers in (0, 1) and [link.rank for link in meetings[0].links] == [1]


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable; removed at the end."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"llamahome-doctor-{os.getpid()}-{number}" for number in range(2)]
    try:
        if any(ip("netns", "add", name).returncode for name in names):
            pytest.skip("this machine does not allow network namespaces")
        cable = ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        assert cable.returncode == 0, cable.stderr
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start(host: str, rank: int, folder: Path, *words: str, address: str = ADDRESSES[0]) -> subprocess.Popen:
    command = [sys.executable, "-m", "llamahome", "doctor", "--json", "--only", "network", "--num-nodes", "2", "--node-rank", str(rank)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    typed = ["ip", "netns", "exec", host, *command, "--master-addr", address, *words]
    return subprocess.Popen(typed, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen) -> tuple[int, dict[str, dict]]:
    out, err = process.communicate(timeout=90)
    assert "Traceback" not in err and out, err
    return process.returncode, {check["name"]: check for check in json.loads(out)["checks"]}


@pytest.mark.medium
def test_two_hosts_measure_their_link_or_say_why_there_is_none(hosts: list[str], tmp_path: Path) -> None:
    machines = [start(hosts[rank], rank, tmp_path) for rank in (1, 0)]
    for status, checks in map(ended, machines):
        assert status == 0 and checks["nodes"]["status"] == "PASS", checks
        assert checks["link-1"]["status"] == "PASS" and "there and back" in checks["link-1"]["detail"]
    ip("-n", hosts[1], "link", "set", "cable", "down")
    short = ("--set", "distributed.join_timeout=3 s")
    machines = [start(hosts[rank], rank, tmp_path, *short) for rank in (0, 1)]
    (status, alone), (other_status, lost) = map(ended, machines)
    assert (status, other_status) == (4, 4)
    assert "missing: machine 1" in alone["nodes"]["detail"]
    assert "is not reached: Network is unreachable" in lost["nodes"]["detail"], lost


@pytest.mark.medium
def test_an_address_that_answers_nothing_and_one_of_another_machine_are_told_apart(hosts: list[str], tmp_path: Path) -> None:
    short = ("--set", "distributed.join_timeout=3 s")
    silent = start(hosts[1], 1, tmp_path, *short, address="10.77.9.77")
    foreign = start(hosts[1], 0, tmp_path, *short)
    status, checks = ended(silent)
    assert status == 4 and ("no answer from 10.77.9.77" in checks["nodes"]["detail"] or "No route to host" in checks["nodes"]["detail"]), (
        checks
    )
    status, checks = ended(foreign)
    assert status == 4 and "machine 0 does not have the address 10.77.9.1" in checks["nodes"]["detail"], checks
