"""Writes what a GPU's memory holds when an allocation fails, for https://pytorch.org/memory_viz.

From the call on, torch keeps the last allocations with their Python stacks, and it calls an observer before it raises. The file is a
pickle, because the viewer reads nothing else; llamahome never reads it. Only the first failure is written, because a step that is done
again with smaller passes may fail several times.
"""

import logging
from pathlib import Path
from typing import Any

import torch

_LOG = logging.getLogger(__name__)
_MOST_ALLOCATIONS = 200_000


def snapshot_at_first_failure(path: Path) -> None:
    """Record allocations from now on, and write `path` when one fails for the first time."""
    memory: Any = torch.cuda.memory
    memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
    attach: Any = torch._C._cuda_attach_out_of_memory_observer  # type: ignore[attr-defined]
    attach(observer(path))


def observer(path: Path) -> Any:
    """What torch calls with the device, the bytes that were asked for, those in use, and those that are free."""
    written: list[Path] = []

    def observe(device: int, asked: int, used: int, free: int) -> None:
        if written:
            return
        written.append(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        except OSError as error:
            _LOG.error("the memory snapshot cannot be written to %s: %s", path, error.strerror or error)
            return
        _LOG.error("out of memory on GPU %d: %d bytes asked, %d in use, %d free; what held them: %s", device, asked, used, free, path)

    return observe
