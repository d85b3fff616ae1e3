"""A copy holds what was there when it was taken, in memory that is taken once; the thread that writes it gives way."""

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
def test_a_copy_is_what_was_there_and_does_not_follow(shapes: dict[str, list[int]], dtype: torch.dtype, turned: bool) -> None:
    live = {name: torch.randint(-99, 99, shape).to(dtype) for name, shape in shapes.items()}
    live = {name: tensor.T if turned and tensor.ndim == 2 else tensor for name, tensor in live.items()}
    before = {name: tensor.clone() for name, tensor in live.items()}
    taken = Snapshot().take(live)
    for tensor in live.values():
        tensor.add_(1)
    assert taken.keys() == live.keys()
    assert all(torch.equal(taken[name], before[name]) and taken[name].dtype == dtype for name in live)
    assert all(tensor.is_contiguous() for tensor in taken.values())


def test_the_memory_of_a_copy_is_used_again_while_shapes_stay() -> None:
    snapshot, live = Snapshot(), {"a": torch.ones(3, 5), "b": torch.tensor(1.0)}
    first = {name: tensor.data_ptr() for name, tensor in snapshot.take(live).items()}
    live["a"].fill_(7)
    again = snapshot.take(live)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == first and bool((again["a"] == 7).all())
    assert snapshot.take({"a": torch.zeros(2)})["a"].shape == (2,)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness belongs to the whole process")
def test_the_writing_thread_gives_way_and_nobody_else_does() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with writer_thread() as thread:
        there = thread.submit(
            lambda: (os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), threading.current_thread().name)
        ).result()
    assert there[0] == min(19, max(10, before)) and there[1].startswith("llamahome-checkpoint")
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
