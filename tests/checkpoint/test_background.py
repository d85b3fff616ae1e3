"""A snapshot keeps the values of the moment while a loop updates, and reuses its memory; the writer thread has its own folder."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.checkpoint.background import Snapshot, writer_thread
from llamahome.checkpoint.store import SaveFailed

SHAPES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.lists(st.integers(0, 4), max_size=3), max_size=6)
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="on other systems both belong to the whole process")
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])


@settings(deadline=None, max_examples=40)
@given(SHAPES, TYPES, st.booleans())
def test_a_snapshot_equals_the_tensors_and_does_not_change_with_them(
    shapes: dict[str, list[int]], dtype: torch.dtype, transposed: bool
) -> None:
    live = {name: torch.randint(-99, 99, shape).to(dtype) for name, shape in shapes.items()}
    live = {name: tensor.T if transposed and tensor.ndim == 2 else tensor for name, tensor in live.items()}
    before = {name: tensor.clone() for name, tensor in live.items()}
    snapshot = Snapshot()
    snapshot.begin(live)
    snapshot.hold_back()
    for tensor in live.values():
        tensor.add_(1)
    copies = snapshot.copies()
    assert copies.keys() == live.keys()
    assert all(torch.equal(copies[name], before[name]) and copies[name].dtype == dtype for name in live)
    assert all(tensor.is_contiguous() for tensor in copies.values())


def large(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of several pieces, of many in a piece, and one whose rows are not contiguous."""
    source = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (3000, 401), "matrix": (700, 900), **{f"vector {number}": (number,) for number in range(0, 300, 7)}}
    tensors = {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
    return {**tensors, "turned": torch.randn(600, 500, generator=source).T, "steps": torch.tensor(float(seed))}


def test_copies_made_beside_updates_have_the_values_of_their_moment() -> None:
    """The moment of the update differs, so that its thread copies nothing, nearly all, or a part."""
    snapshot, live = Snapshot(), large(0)

    def write() -> dict[str, torch.Tensor]:
        return {name: copy.clone() for name, copy in snapshot.copies().items()}

    with writer_thread() as thread:
        for number in range(30):
            before = {name: tensor.clone() for name, tensor in live.items()}
            snapshot.begin(live)
            written = thread.submit(write)
            time.sleep(0.0003 * (number % 7))
            snapshot.hold_back()
            for tensor in live.values():
                tensor.mul_(-1.5).add_(number)
            copies = written.result()
            assert all(torch.equal(copies[name], before[name]) for name in live), number


def test_what_a_forward_pass_changes_is_copied_at_once() -> None:
    snapshot, live = Snapshot(), {"weight": torch.ones(9), "running_mean": torch.zeros(9)}
    snapshot.begin(live, passes_change={"running_mean", "another"})
    live["running_mean"].add_(1)
    assert not bool(snapshot.copies()["running_mean"].any())


@pytest.mark.parametrize("first", ["hold_back", "copies"])
def test_a_copy_that_fails_fails_the_save_and_not_the_update(first: str) -> None:
    snapshot, live = Snapshot(), large(1)
    snapshot.begin({**live, "steps": torch.eye(3).to_sparse()})  # torch copies none of these into a dense tensor
    if first == "hold_back":
        snapshot.hold_back()
    with pytest.raises(SaveFailed, match="could not be copied"):
        snapshot.copies()
    snapshot.hold_back()
    snapshot.begin(live)
    assert all(torch.equal(copy, live[name]) for name, copy in snapshot.copies().items())


def test_copies_for_which_there_is_no_memory_fail_the_save() -> None:
    with pytest.raises(SaveFailed) as caught:
        Snapshot().begin({"weight": torch.zeros(1).expand(2**50)})
    assert caught.value.problems[0].code == "checkpoint.write-failed" and caught.value.problems[0].hint


def test_the_memory_of_a_snapshot_is_reused_while_shapes_stay() -> None:
    snapshot, live = Snapshot(), {"a": torch.ones(3, 5), "b": torch.tensor(1.0)}
    first = {name: tensor.data_ptr() for name, tensor in take(snapshot, live).items()}
    live["a"].fill_(7)
    again = take(snapshot, live)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == first and bool((again["a"] == 7).all())
    assert take(snapshot, {"a": torch.zeros(2)})["a"].shape == (2,)


def take(snapshot: Snapshot, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    snapshot.begin(live)
    return snapshot.copies()


@ON_LINUX
def test_the_writer_thread_stays_in_its_folder_while_the_loop_works_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with writer_thread() as thread:
        os.chdir("elsewhere")  # as a reward of the user's may
        thread.submit(Path("written").write_text, "1").result()
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["written"] and not list(Path().iterdir())


@ON_LINUX
def test_only_the_writer_thread_has_a_low_priority() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with writer_thread() as thread:
        niceness, name = thread.submit(
            lambda: (os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), threading.current_thread().name)
        ).result()
    assert niceness == min(19, max(10, before)) and name.startswith("llamahome-checkpoint")
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
