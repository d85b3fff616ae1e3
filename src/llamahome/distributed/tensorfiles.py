"""Writes whole or sharded tensors to safetensors files of whole tensors; several processes write at the same time.

The files do not depend on the number of processes or on the sharding, so any number of processes can read them. Each sharded tensor costs
one collective, and a writer holds the whole tensors of one file in memory at a time.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

LARGEST_FILE = 4 * 2**30
"""Bytes; also the most that a writer holds at a time."""


@dataclass(frozen=True)
class TensorSlices:
    """A tensor of which each process holds a slice."""

    nbytes: int
    """Bytes of the whole tensor."""
    fetch: Callable[[], Tensor]
    """Returns the whole tensor. All processes call it, in the same order."""


@dataclass(frozen=True)
class WriterShare:
    """Which of the files this process writes."""

    number: int
    """-1 if the process takes part in the collectives but writes nothing."""
    count: int
    """Number of processes that write."""


WRITES_ALL = WriterShare(0, 1)
TAKES_PART = WriterShare(-1, 1)


@dataclass(frozen=True)
class Written:
    """The result of `write_files`."""

    file_of: dict[str, str]
    """Name of each tensor -> name of its file."""
    mine: list[Path]
    """The files that this process wrote."""


def plan_files(sizes: Mapping[str, int], *, writers: int, largest: int = LARGEST_FILE) -> list[list[str]]:
    """Distribute tensors over files, balanced by size; returns the tensor names of each file.

    There are as many files as writers, or a multiple of that if files would exceed `largest`; no file is empty.
    """
    files_each = max(1, -(-sum(sizes.values()) // (largest * writers)))
    loads: list[tuple[int, int]] = [(0, number) for number in range(files_each * writers)]
    files: list[list[str]] = [[] for _ in loads]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, number = loads[0]
        files[number].append(name)
        heapq.heapreplace(loads, (load + sizes[name], number))
    return [sorted(names) for names in files if names]


def write_files(
    folder: Path, stem: str, tensors: Mapping[str, Tensor | TensorSlices], *, part: WriterShare, metadata: Mapping[str, str] | None = None
) -> Written:
    """Write this process's share of `tensors` to `stem`.safetensors or to several numbered files.

    All processes call it with the same names, also those that write nothing. If a write fails, the process still takes part in the
    remaining collectives and raises the OSError or SafetensorError at the end.
    """
    files = plan_files({name: tensor.nbytes for name, tensor in tensors.items()}, writers=part.count)
    names = [f"{stem}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    queue = list(zip(names if len(files) > 1 else [f"{stem}.safetensors"], files, strict=False))
    mine: list[Path] = []
    errors: list[Exception] = []
    for start in range(0, len(queue), part.count):
        batch = queue[start : start + part.count]
        fetched = [_fetch(tensors, members, keep=number == part.number) for number, (_, members) in enumerate(batch)]
        if 0 <= part.number < len(batch):  # only now, so that all processes write at the same time
            mine.append(folder / batch[part.number][0])
            try:
                safetensors.torch.save_file(fetched[part.number], mine[-1], metadata=dict(metadata or {}))
            except (OSError, safetensors.SafetensorError) as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return Written({member: name for name, members in queue for member in members}, mine)


def _fetch(tensors: Mapping[str, Tensor | TensorSlices], names: list[str], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU; without `keep` only take part in the collectives and return nothing."""
    kept = {}
    for name in names:
        tensor = tensors[name]
        whole = tensor.fetch() if isinstance(tensor, TensorSlices) else tensor
        if keep:
            kept[name] = whole.detach().cpu().contiguous()
    return kept
