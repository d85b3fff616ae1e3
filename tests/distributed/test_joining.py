"""Processes that another launcher started, or pretends to have started, join or say what is missing."""

import json
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


def joining(port: int, patience: str, variables: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-c", JOIN, patience, str(port)]
    return subprocess.Popen(command, env=worker_environment(**variables), stdout=subprocess.PIPE, text=True, cwd=ROOT)


def of_srun(rank: int) -> dict[str, str]:
    return {**SRUN_NODES, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def test_tasks_of_srun_join_without_being_told_where() -> None:
    port = free_port()
    both = [joining(port, "40 s", of_srun(rank)) for rank in (1, 0)]
    said = sorted(process.communicate(timeout=60)[0] for process in both)
    assert said == ["0 2 1.0\n", "1 2 1.0\n"]


def test_variables_that_a_shell_kept_end_in_an_error_that_names_who_did_not_come() -> None:
    kept = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = joining(29500, "1 s", kept)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "error[distributed.ranks-missing]: torchrun: processes 1 and 2 of 3 did not arrive within 1 s" in said
    assert "help: unset RANK WORLD_SIZE" in said


def test_a_first_process_that_is_not_there_is_told() -> None:
    process = joining(free_port(), "1 s", of_srun(1))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 4 and "error[distributed.machines-not-met]" in said


def test_processes_that_would_do_something_else_are_named() -> None:
    told = run_workers("tests/distributed/tasks.py:disagree", 2)
    assert told[1] == ["distributed.ranks-differ"] and told[0] == ["distributed.peer-lost"]


@pytest.mark.slow
def test_who_does_not_come_is_named_with_where_it_was_seen_last() -> None:
    said = json.loads(json.dumps(run_workers("tests/distributed/tasks.py:wait_in_vain", 2)))
    assert "process 0 of 2 cannot go on in training" in said[0]
    assert "process 1 (last seen while reading the data) did not come" in said[0]
