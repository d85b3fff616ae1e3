import pytest

from llamahome.distributed.rank_info import RankInfo, find_rank_info, first_host, leftovers
from llamahome.errors import ConfigError, MachineError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_the_variables_of_torchrun_srun_and_mpirun_are_read() -> None:
    assert find_rank_info(TORCHRUN) == RankInfo(
        rank=3, size=4, local_rank=1, local_size=2, starter="torchrun", address="10.0.0.1", port=29501
    )
    assert find_rank_info(SRUN) == RankInfo(rank=5, size=7, local_rank=1, local_size=3, starter="srun", address="gpu07")
    assert find_rank_info(MPIRUN) == RankInfo(rank=1, size=2, local_rank=1, local_size=2, starter="mpirun", address="127.0.0.1")
    mpich = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "a"}
    assert find_rank_info(mpich) == RankInfo(rank=2, size=4, local_rank=0, local_size=2, starter="mpirun", address="a")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "4"},
        {"RANK": "0", "LOCAL_RANK": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "4"},
    ],
)
def test_an_incomplete_set_of_variables_is_ignored(environment: dict[str, str]) -> None:
    assert find_rank_info(environment) == RankInfo() and not RankInfo().joins


def test_ignored_variables_are_listed() -> None:
    assert leftovers({"WORLD_SIZE": "4", "HOME": "/"}) == ["WORLD_SIZE=4"]
    assert leftovers(TORCHRUN) == leftovers({}) == []


@pytest.mark.parametrize(
    "change",
    [{"RANK": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "four"}, {"LOCAL_RANK": "2"}, {"MASTER_PORT": "x"}],
)
def test_numbers_that_do_not_fit_are_an_error(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        find_rank_info({**TORCHRUN, **change})
    assert caught.value.problems[0].code == "distributed.bad-environment"
    assert next(iter(change)) in caught.value.problems[0].message or change == {"WORLD_SIZE": "0"}


def test_a_rank_without_an_address_is_an_error() -> None:
    with pytest.raises(MachineError) as caught:
        find_rank_info({"RANK": "0", "WORLD_SIZE": "2"})
    assert caught.value.problems[0].code == "distributed.no-meeting-place"


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[07-09,12],login", "gpu07"), ("a,b", "a"), ("n[1,3]-x", "n1-x"), ("one", "one"), ("", None)]
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, first: str | None) -> None:
    assert first_host(nodes) == first
