"""A run of two machines that meets a fault every 20 seconds ends with the weights of a run without faults.

Each machine is a network namespace. A small supervisor stands for the cluster's scheduler: it resumes the run if both launchers have ended.
SOAK_STEPS (12,000) is the length of the run: half an hour with faults on two cores, a tenth of it without.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from tests.e2e.test_two_hosts import LONG, Hosts, ended, losses
from tests.support.projects import Project

STEPS = int(os.environ.get("SOAK_STEPS", "12000"))
SECONDS_BETWEEN_FAULTS = 20
WORDS = (*LONG, "--max-steps", str(STEPS), "--set", "distributed.max_restarts=100000", "--set", "checkpoint.every=100 steps")
RESUME = [sys.executable, "-m", "llamahome", "train-resume", "latest"]


def kill_a_process(hosts: Hosts, random: random.Random) -> None:
    hosts.worker(random.randrange(2)).kill()


def stop_a_process_for_a_while(hosts: Hosts, random: random.Random) -> None:
    worker = hosts.worker(random.randrange(2))
    worker.send_signal(signal.SIGSTOP)
    time.sleep(random.uniform(1, 8))
    worker.send_signal(signal.SIGCONT)


def cut_the_cable_for_a_while(hosts: Hosts, random: random.Random) -> None:
    hosts.cut()
    time.sleep(random.uniform(1, 8))
    hosts.repair()


def switch_a_machine_off(hosts: Hosts, random: random.Random) -> None:
    hosts.kill(random.randrange(2))


FAULTS = (kill_a_process, kill_a_process, stop_a_process_for_a_while, cut_the_cable_for_a_while, switch_a_machine_off)


def begin(project: Project, hosts: Hosts) -> list:
    """Start or resume the run on both machines."""
    if not (project.folder / "output/training").exists() or not project.run.checkpoints:
        return [hosts.start(project, number, *WORDS) for number in range(2)]
    return [hosts.command(project, number, *RESUME, "--set", f"distributed.node_rank={number}") for number in range(2)]


@pytest.mark.slow
def test_a_run_with_a_fault_every_20_seconds_ends_with_identical_weights(project: Project, hosts: Hosts) -> None:
    results = ended([hosts.start(project, number, *WORDS) for number in range(2)], 3600)
    assert [status for status, _ in results] == [0, 0], results
    undisturbed, expected = project.run.weights(), losses(project)
    (project.folder / "output/training").unlink()  # what begins now is a run of its own

    faults, resumed, seed = Counter[str](), 0, random.Random(1)
    begun, machines = time.monotonic(), begin(project, hosts)
    due = begun + SECONDS_BETWEEN_FAULTS
    while True:
        if all(machine.poll() is not None for machine in machines):
            statuses = [machine.returncode for machine in machines]
            errors = [machine.communicate()[1] for machine in machines]
            if statuses == [0, 0]:
                break
            assert set(statuses) <= {0, 1, 4, 7, 75, -signal.SIGKILL}, (statuses, errors)
            assert all("Traceback" not in error for error in errors), errors
            machines, resumed = begin(project, hosts), resumed + 1
        if time.monotonic() >= due:
            fault = seed.choice(FAULTS)
            try:
                fault(hosts, seed)
                faults[fault.__name__] += 1
            except (StopIteration, psutil.NoSuchProcess):
                pass  # the processes are being started just now
            due = time.monotonic() + SECONDS_BETWEEN_FAULTS
        time.sleep(0.2)
    seconds = time.monotonic() - begun

    found = losses(project)
    figures = {"steps": STEPS, "seconds": round(seconds), "faults": dict(faults), "resumed by the scheduler": resumed}
    print(json.dumps(figures))
    Path(os.environ.get("SOAK_RESULTS", os.devnull)).write_text(json.dumps(figures) + "\n", encoding="utf-8")
    assert faults.total() > 0
    assert found == expected and list(found) == sorted(found), "no step is lost, doubled or different"
    assert project.run.weights() == undisturbed
    assert hosts.processes(0) == hosts.processes(1) == []
