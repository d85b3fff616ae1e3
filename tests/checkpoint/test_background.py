"""A snapshot keeps the values of the moment and reuses its memory; the writer thread has a low priority."""

import os
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.checkpoint.background import Snapshot, writer_thread

SHAPES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.lists(st.integers(0, 4), max_size=3), max_size=6)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])


@settings(deadline=None, max_examples=40)
@given(SHAPES, TYPES, st.booleans())
def test_a_snapshot_equals_the_tensors_and_does_not_change_with_them(
    shapes: dict[str, list[int]], dtype: torch.dtype, transposed: bool
) -> None:
    live = {name: torch.randint(-99, 99, shape).to(dtype) for name, shape in shapes.items()}
    live = {name: tensor.T if transposed and tensor.ndim == 2 else tensor for name, tensor in live.items()}
    before = {name: tensor.clone() for name, tensor in live.items()}
    copies = Snapshot().take(live)
    for tensor in live.values():
        tensor.add_(1)
    assert copies.keys() == live.keys()
    assert all(torch.equal(copies[name], before[name]) and copies[name].dtype == dtype for name in live)
    assert all(tensor.is_contiguous() for tensor in copies.values())


def test_the_memory_of_a_snapshot_is_reused_while_shapes_stay() -> None:
    snapshot, live = Snapshot(), {"a": torch.ones(3, 5), "b": torch.tensor(1.0)}
    first = {name: tensor.data_ptr() for name, tensor in snapshot.take(live).items()}
    live["a"].fill_(7)
    again = snapshot.take(live)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == first and bool((again["a"] == 7).all())
    assert snapshot.take({"a": torch.zeros(2)})["a"].shape == (2,)


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems the niceness belongs to the whole process")
def test_only_the_writer_thread_has_a_low_priority() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with writer_thread() as thread:
        niceness, name = thread.submit(
            lambda: (os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), threading.current_thread().name)
        ).result()
    assert niceness == min(19, max(10, before)) and name.startswith("llamahome-checkpoint")
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
