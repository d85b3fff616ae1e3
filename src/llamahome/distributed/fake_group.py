"""A fake process group: one process runs the code of one rank among many, and every collective is recorded.

torch's fake backend completes every collective at once without data, so the recorded collectives are meaningful but no value is. Under
fake tensors nothing is computed and weights take no memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from llamahome.distributed.world import World

_KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}


@dataclass(frozen=True)
class RecordedCollective:
    """One collective."""

    kind: str
    """all_gather, reduce_scatter, all_reduce, or torch's own name of another one."""
    whole_bytes: int
    """Bytes of all ranks of the group together."""
    ranks: tuple[int, ...]


class CollectiveRecorder(TorchDispatchMode):
    """Records the collectives inside its block, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[RecordedCollective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; record it if it is a collective."""
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            tensors = [each for arg in args for each in (arg if isinstance(arg, list) else [arg]) if isinstance(each, torch.Tensor)]
            group = next(
                dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            )
            size = max((each.numel() * each.element_size() for each in tensors), default=0)
            self.seen.append(RecordedCollective(_KINDS.get(name, name), size, tuple(dist.get_process_group_ranks(group))))
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_world(size: int, *, local_size: int) -> Iterator[World]:
    """Be rank 0 of `size` processes, `local_size` per machine. Must not be nested in a real process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, 0, torch.device("cpu"), local_size)
    finally:
        dist.destroy_process_group()
