"""A file keeps tensors as they are, in as little room as they need, and says what ails it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.small_disks import small_disk

from llamahome.errors import MachineError
from llamahome.model.backends.file_store import FileStore, file_store, store_folder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.tuples(st.integers(1, 3000), st.sampled_from(DTYPES)), min_size=1, max_size=5), min_size=1, max_size=3))
def test_tensors_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, passes: list[list[tuple[int, torch.dtype]]]) -> None:
    store = FileStore(tmp_path_factory.getbasetemp())
    for sizes in passes:
        tensors = [torch.randn(1, size, 3).to(dtype) for size, dtype in sizes]
        stored = [store.store(x) for x in tensors]
        for x, each in reversed(list(zip(tensors, stored, strict=True))):
            each.fetch()
            found = each.load()
            assert torch.equal(found, x) and found.dtype == x.dtype and found.shape == x.shape


def test_rows_that_lie_apart_are_kept_too(tmp_path: Path) -> None:
    x = torch.randn(8, 6)[:, ::2]
    assert torch.equal(FileStore(tmp_path).store(x).load(), x)


def test_the_file_is_as_long_as_one_pass_and_has_no_name(tmp_path: Path) -> None:
    store, lengths = FileStore(tmp_path), []
    for _ in range(3):
        stored = [store.store(torch.randn(1, 500, 8)) for _ in range(4)]
        assert [each.load().shape for each in stored] == [(1, 500, 8)] * 4
        del stored
        lengths.append(Path(f"/proc/self/fd/{store._file.fileno()}").stat().st_size if Path("/proc").exists() else 0)
    assert len(set(lengths)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_with_what_helps(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1m") as folder:
        store = FileStore(folder)
        with pytest.raises(MachineError) as caught:
            for each in [store.store(torch.randn(1 << 17)) for _ in range(4)]:
                each.load()
        (problem,) = caught.value.problems
        assert problem.code == "training.offload-failed" and str(folder) in problem.message
        assert "TMPDIR" in (problem.hint or "")
        store._file.close()  # or the disk could not be unmounted


def test_a_disk_in_memory_is_no_place(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1m") as folder:
        found = file_store(folder / ".")
        assert isinstance(found, str) and "in memory itself" in found


def test_a_folder_that_is_not_there_is_no_place(tmp_path: Path) -> None:
    found = file_store(tmp_path / "missing")
    assert isinstance(found, str) and "cannot be written: No such file or directory" in found


def test_the_folder_is_that_of_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert store_folder() == tmp_path
    store = file_store(tmp_path)
    assert isinstance(store, FileStore) and str(tmp_path) in store.place and (store.free_bytes() or 0) > 0
