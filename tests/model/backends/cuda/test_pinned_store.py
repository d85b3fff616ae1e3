"""Buffers in the machine's memory give tensors back as they were, and are used again; here without streams, on a processor."""

import torch

from llamahome.model.backends.cuda.pinned_store import PinnedStore


def test_tensors_come_back_as_they_were() -> None:
    store = PinnedStore(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.randn(1, length, 6).to(dtype) for length in (40, 7, 40)]
        stored = [store.store(x) for x in tensors]
        originals = [x.clone() for x in tensors]
        for x in tensors:
            x.zero_()  # the store has copies
        for x, each in reversed(list(zip(originals, stored, strict=True))):
            each.fetch()
            found = each.load()
            assert torch.equal(found, x) and found.dtype == dtype and found.data_ptr() != each.host.data_ptr()


def test_buffers_are_used_again_and_grow_with_the_passes() -> None:
    store = PinnedStore(torch.device("cpu"))
    used = []
    for length in (10, 10, 30, 10):
        stored = [store.store(torch.randn(length)) for _ in range(3)]
        used.append({each.host.data_ptr() for each in stored})
        del stored
        assert len(store._free) == 3
    assert used[0] == used[1] and used[2] == used[3]
    assert {buffer.nbytes for buffer in store._free} == {120}


def test_a_tensor_can_be_given_up_while_it_is_on_its_way() -> None:
    store = PinnedStore(torch.device("cpu"))
    stored = store.store(torch.ones(5))
    stored.fetch()
    del stored
    assert torch.equal(store.store(torch.zeros(5)).load(), torch.zeros(5))
