"""Processes that do not exist: one process runs the code of a rank among many, and every exchange with the others is written down.

torch's fake process group answers every exchange at once with whatever lies in memory, so only what is exchanged means something, never
a value. With fake tensors around it, nothing is computed and no weight takes memory.
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
class Seen:
    """An exchange as torch was asked for it."""

    kind: str
    """all_gather, reduce_scatter, all_reduce, or torch's own name for another one."""
    whole_bytes: int
    """What all ranks of the group have together."""
    ranks: tuple[int, ...]


class Witness(TorchDispatchMode):
    """Writes down the exchanges inside its block, in their order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the operation happen; remember it when it is an exchange."""
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            tensors = [each for arg in args for each in (arg if isinstance(arg, list) else [arg]) if isinstance(each, torch.Tensor)]
            group = next(
                dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            )
            whole = max((each.numel() * each.element_size() for each in tensors), default=0)
            self.seen.append(Seen(_KINDS.get(name, name), whole, tuple(dist.get_process_group_ranks(group))))
        return func(*args, **(kwargs or {}))


@contextmanager
def imagined_world(size: int, *, local_size: int) -> Iterator[World]:
    """Be rank 0 of `size` processes, `local_size` of them on each machine. Not beside a real process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, 0, torch.device("cpu"), local_size)
    finally:
        dist.destroy_process_group()
