"""Several processes write one checkpoint, which one process can read; if one of them cannot write, all raise and nothing is left."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.checkpoint.tasks import SHAPES
from tests.support.checkpoints import differences
from tests.support.workers import run_workers

from llamahome.checkpoint.manifest import verify
from llamahome.checkpoint.store import load
from llamahome.distributed.tensorfiles import TensorSlices, WriterShare, plan_files, write_files


@pytest.mark.medium
@pytest.mark.parametrize(("world_size", "full_disk_rank"), [(2, 1), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_a_checkpoint_of_several_processes_is_read_by_one(tmp_path: Path, world_size: int, full_disk_rank: int) -> None:
    payload = {"folder": str(tmp_path), "full": full_disk_rank}
    errors = run_workers("tests/checkpoint/tasks.py:save_with_a_full_disk", world_size, payload)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]
    assert differences(load(tmp_path / "checkpoint-3")) == []
    assert len(list((tmp_path / "checkpoint-3/optimizer").glob("*.safetensors"))) == world_size
    assert [each["code"] for each in errors] == ["checkpoint.write-failed"] * world_size
    assert all("No space left" in each["message"] for each in errors)


@pytest.mark.medium
def test_saves_in_a_thread_and_the_exchanges_of_the_loop_do_not_mix(tmp_path: Path) -> None:
    """One rank fails two of the saves: they fail on both, and nothing of them stays."""
    first, second = run_workers("tests/checkpoint/tasks.py:save_beside_exchanges", 2, {"folder": str(tmp_path), "full": 1})
    failed = ["checkpoint.write-failed", "SaveFailed"]
    assert first == second == {"ended": {"3": None, "4": None, "5": failed, "6": failed, "7": None, "8": None}, "wrong sums": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (3, 4, 7, 8)]
    assert [(tmp_path / f"checkpoint-{step}/model/part-{rank}").read_text() for step in (3, 8) for rank in (0, 1)] == ["3", "3", "8", "8"]
    assert all(verify(path) == [] for path in tmp_path.iterdir())


@pytest.mark.slow
def test_a_rank_that_ends_in_a_save_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="result-1"):  # of the rank that ended
        run_workers("tests/checkpoint/tasks.py:end_in_a_save", 2, {"folder": str(folder), "told": str(tmp_path / "told")})
    assert (tmp_path / "told").read_text() == "distributed.peer-lost"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3"]
    assert differences(load(folder / "checkpoint-3")) == []


@pytest.mark.medium
@pytest.mark.parametrize(("ranks", "machine", "full"), [(2, 2, 1), pytest.param(4, 2, 2, marks=pytest.mark.slow)])
def test_rows_of_several_processes_are_saved_in_a_thread_as_whole_tensors(tmp_path: Path, ranks: int, machine: int, full: int) -> None:
    """A process without memory for a whole tensor still receives its rows, so that nobody waits; the save fails on all."""
    payload = {"folder": str(tmp_path), "machine": machine, "full": full}
    found = run_workers("tests/checkpoint/tasks.py:save_rows", ranks, payload)
    assert found == [[None, True, None]] * ranks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    for step in (1, 3):
        assert verify(tmp_path / f"checkpoint-{step}") == []
        files = sorted((tmp_path / f"checkpoint-{step}/optimizer").glob("*.safetensors"))
        whole = {name: tensor for path in files for name, tensor in load_file(path).items()}
        assert len(files) == ranks and {name: tuple(tensor.shape) for name, tensor in whole.items()} == SHAPES
        for tensor in whole.values():
            assert torch.equal(tensor, torch.full_like(tensor, step) * torch.arange(len(tensor)).reshape(-1, *[1] * (tensor.ndim - 1)))


@pytest.mark.medium
def test_what_another_disk_has_under_the_name_of_the_partial_folder_is_not_taken_for_it(tmp_path: Path) -> None:
    first, second = run_workers("tests/checkpoint/tasks.py:save_beside_a_leftover", 2, {"folder": str(tmp_path)})
    assert first == ["checkpoint-3"] and second == ["checkpoint-3.tmp"]
    assert verify(tmp_path / "0/checkpoint-3") == [] and differences(load(tmp_path / "0/checkpoint-3")) == []
    assert not [path for path in (tmp_path / "1").rglob("*") if path.is_file()], "the process without the folder writes nothing"


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 100)), st.integers(1, 5), st.integers(10, 200))
def test_every_tensor_is_in_one_file_and_files_are_balanced(sizes: dict[str, int], writers: int, largest: int) -> None:
    files = plan_files(sizes, writers=writers, largest=largest)
    assert sorted(name for names in files for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in files]
    assert not loads or max(loads) <= sum(loads) / max(1, len(loads)) + max(sizes.values())


def test_a_process_without_a_share_gives_its_slices_and_writes_nothing(tmp_path: Path) -> None:
    fetched = []
    tensors = {name: TensorSlices(8, lambda to, name=name: fetched.append((name, to))) for name in ("b", "a", "c")}
    written = write_files(tmp_path, "model", tensors, part=WriterShare(-1, 2, ranks=(0, 3)))
    assert sorted(fetched) == [("a", 0), ("b", 3), ("c", 0)] and written.mine == [] and not list(tmp_path.iterdir())
    assert set(written.file_of.values()) == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
