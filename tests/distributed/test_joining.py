"""Processes that another launcher started join the group; if one is missing, the error names it."""

import subprocess
import sys

import pytest
from tests.support.workers import ROOT, free_port, run_workers, worker_environment

SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
SRUN_NODES = {**SRUN, "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
JOIN = """
import sys
from llamahome.config.schema import DistributedConfig
from llamahome.distributed.world import open_world
from llamahome.errors import LlamaHomeError
try:
    with open_world(DistributedConfig(join_timeout=sys.argv[1], master_port=int(sys.argv[2])), say=print) as world:
        print(world.rank, world.size, world.max(float(world.rank)))
except LlamaHomeError as error:
    print(error)
    sys.exit(error.exit_status)
"""


def joining(port: int, timeout: str, variables: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-c", JOIN, timeout, str(port)]
    return subprocess.Popen(command, env=worker_environment(**variables), stdout=subprocess.PIPE, text=True, cwd=ROOT)


def of_srun(rank: int) -> dict[str, str]:
    return {**SRUN_NODES, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


@pytest.mark.medium
def test_tasks_of_srun_join_without_an_address() -> None:
    port = free_port()
    both = [joining(port, "40 s", of_srun(rank)) for rank in (1, 0)]
    output = sorted(process.communicate(timeout=60)[0] for process in both)
    assert output == ["0 2 1.0\n", "1 2 1.0\n"]


@pytest.mark.medium
def test_leftover_variables_lead_to_an_error_that_names_the_missing_ranks() -> None:
    leftover = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = joining(29500, "1 s", leftover)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "error[distributed.ranks-missing]: torchrun: processes 1 and 2 of 3 did not arrive within 1 s" in output
    assert "help: unset RANK WORLD_SIZE" in output


@pytest.mark.medium
def test_a_missing_process_0_is_an_error() -> None:
    process = joining(free_port(), "1 s", of_srun(1))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4 and "error[distributed.machines-not-met]" in output


def test_processes_with_different_settings_refuse() -> None:
    codes = run_workers("tests/distributed/tasks.py:disagree", 2)
    assert codes == [["distributed.peer-lost"], ["distributed.ranks-differ"]]


@pytest.mark.slow
def test_a_collective_that_times_out_names_the_missing_rank_and_its_last_phase() -> None:
    message = run_workers("tests/distributed/tasks.py:time_out", 2)[0]
    assert "process 0 of 2 failed in training" in message
    assert "process 1 (last seen while reading the data) did not join" in message
