import os

import pytest
import torch
from tests.support.workers import run_workers

from llamahome.config.schema import DistributedConfig
from llamahome.distributed.world import open_world
from llamahome.errors import MachineError


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LLAMAHOME_LAUNCH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def two():
    return run_workers("tests/distributed/tasks.py:collectives", 2)


def test_each_process_knows_its_rank_and_device(two):
    assert [each["place"] for each in two] == [[rank, 2, rank, rank == 0, "cpu"] for rank in range(2)]


def test_collectives_give_the_same_result_on_all_processes(two):
    for each in two:
        assert each["sum"] == [3.0, 20.0]
        assert each["any"] == [True, False, True]
        assert each["max"] == [1.0, -1.5, "nan"]
        assert each["object"] == {"run": "räven", "n": [1, None, 2.5]}
        assert each["empty"] == ""


def test_gradients_are_summed_and_a_missing_one_counts_as_zeros(two):
    for each in two:
        assert each["gradients"] == [[[0, 3, 6], [9, 12, 15]], 7, [0, 0, 0, 0]]
        assert each["half"] == [2, 2, 2]
        assert each["frozen"]


def test_a_collective_waits_for_distributed_timeout_not_for_join_timeout(two):
    assert [each["timeout"] for each in two] == [50.0, 50.0]  # support/workers.py sets it; join_timeout is 45 s


def test_nothing_listens_beyond_loopback_on_one_machine(two):
    for each in two[1:]:  # process 0 hosts the store that an outer launcher asked for
        assert each["beyond loopback"] == []
    assert all(each["loopback"] for each in two)


def test_collectives_of_one_process_change_nothing():
    with open_world(DistributedConfig(), say=lambda text: pytest.fail(text)) as world:
        tensor = torch.tensor([1.0, 2.0])
        world.sum_(tensor)
        parameter = torch.nn.Parameter(torch.zeros(2))
        world.sum_gradients_([parameter])
        world.barrier()
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert tensor.tolist() == [1.0, 2.0] and parameter.grad is None
        assert (world.any(True), world.any(False), world.max(2.5)) == (True, False, 2.5)
        assert world.broadcast_object({"a": 1}) == {"a": 1}
    assert not torch.distributed.is_initialized()


def test_nccl_without_cuda_becomes_gloo_with_one_message():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    messages = []
    with open_world(DistributedConfig(backend="nccl", world_size=4), say=messages.append):
        pass
    assert len(messages) == 1 and "gloo" in messages[0]


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with open_world(DistributedConfig(), say=lambda text: None):
        assert 1 <= torch.get_num_threads() <= max(before, os.cpu_count())
    assert torch.get_num_threads() == before


def test_leftover_variables_of_a_launcher_are_an_error_at_once(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MachineError) as caught, open_world(DistributedConfig(), say=lambda text: None):
        pass
    assert caught.value.problems[0].code == "distributed.no-meeting-place"


@pytest.mark.slow
def test_a_lost_process_is_an_error_for_the_others_and_no_hang():
    with pytest.raises(AssertionError, match=r"distributed\.peer-lost"):
        run_workers("tests/distributed/tasks.py:lose_a_peer", 2)
