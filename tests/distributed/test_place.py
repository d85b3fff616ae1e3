import pytest

from llamahome.distributed.place import Place, find_place, first_host, leftovers
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


def test_torchrun_srun_and_mpirun_are_understood() -> None:
    assert find_place(TORCHRUN) == Place(rank=3, size=4, local_rank=1, local_size=2, starter="torchrun", address="10.0.0.1", port=29501)
    assert find_place(SRUN) == Place(rank=5, size=7, local_rank=1, local_size=3, starter="srun", address="gpu07")
    assert find_place(MPIRUN) == Place(rank=1, size=2, local_rank=1, local_size=2, starter="mpirun", address="127.0.0.1")
    mpich = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "a"}
    assert find_place(mpich) == Place(rank=2, size=4, local_rank=0, local_size=2, starter="mpirun", address="a")


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
def test_what_is_no_whole_place_is_left_over_and_starts_nothing(environment: dict[str, str]) -> None:
    assert find_place(environment) == Place() and not Place().joins


def test_lonely_variables_are_named() -> None:
    assert leftovers({"WORLD_SIZE": "4", "HOME": "/"}) == ["WORLD_SIZE=4"]
    assert leftovers(TORCHRUN) == leftovers({}) == []


@pytest.mark.parametrize(
    "change",
    [{"RANK": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "four"}, {"LOCAL_RANK": "2"}, {"MASTER_PORT": "x"}],
)
def test_numbers_that_do_not_fit_are_a_mistake_in_the_environment(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        find_place({**TORCHRUN, **change})
    assert caught.value.problems[0].code == "distributed.bad-environment"
    assert next(iter(change)) in caught.value.problems[0].message or change == {"WORLD_SIZE": "0"}


def test_a_place_without_a_meeting_place_is_told() -> None:
    with pytest.raises(MachineError) as caught:
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
    assert caught.value.problems[0].code == "distributed.no-meeting-place"


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[07-09,12],login", "gpu07"), ("a,b", "a"), ("n[1,3]-x", "n1-x"), ("one", "one"), ("", None)]
)
def test_the_first_of_slurms_nodes(nodes: str, first: str | None) -> None:
    assert first_host(nodes) == first
