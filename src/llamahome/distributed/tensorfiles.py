"""Writes whole or sharded tensors to safetensors files of whole tensors; several processes write at the same time.

The files do not depend on the number of processes or on the sharding, so any number of processes can read them. Each process sends its
rows of a sharded tensor to the one that writes it, and a writer holds the whole tensors of one file in memory at a time.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from llamahome.distributed.devices import is_out_of_memory
from llamahome.distributed.world import World

LARGEST_FILE = 4 * 2**30
"""Bytes; also the most that a writer holds at a time."""


@dataclass(frozen=True)
class TensorSlices:
    """A tensor of which each process holds a slice."""

    nbytes: int
    """Bytes of the whole tensor."""
    fetch: Callable[[int], Tensor | None]
    """Returns the whole tensor on the CPU of the process of this rank, None on the others. All processes call it, in the same order."""


@dataclass(frozen=True)
class WriterShare:
    """Which of the files this process writes."""

    number: int
    """-1 if the process sends its slices but writes nothing."""
    count: int
    """Number of processes that write."""
    ranks: tuple[int, ...] = ()
    """Their ranks; the first `count` ones if it is empty."""

    def rank(self, number: int) -> int:
        """The rank of the process with the share `number`."""
        return self.ranks[number] if self.ranks else number


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

    All processes call it with the same names, also those that write nothing. If a write fails or memory runs out, the process still takes
    part in the remaining exchanges and raises the OSError, SafetensorError or MemoryError at the end.
    """
    files = plan_files({name: tensor.nbytes for name, tensor in tensors.items()}, writers=part.count)
    names = [f"{stem}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    queue = list(zip(names if len(files) > 1 else [f"{stem}.safetensors"], files, strict=False))
    mine: list[Path] = []
    errors: list[Exception] = []
    for start in range(0, len(queue), part.count):
        batch = queue[start : start + part.count]
        fetched = [_fetch(tensors, members, to=part.rank(number), keep=number == part.number) for number, (_, members) in enumerate(batch)]
        if 0 <= part.number < len(batch):  # only now, so that all processes write at the same time
            mine.append(folder / batch[part.number][0])
            try:
                own = fetched[part.number]
                if isinstance(own, MemoryError):
                    raise own
                safetensors.torch.save_file(own, mine[-1], metadata=dict(metadata or {}))
            except (OSError, safetensors.SafetensorError, MemoryError) as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return Written({member: name for name, members in queue for member in members}, mine)


def collect(world: World, mine: Tensor, counts: Sequence[int], *, first: int, to: int) -> Tensor | None:
    """The whole tensor on the process `to`, of whose rows the processes from rank `first` on hold `counts` each; None on the others.

    Rows are those of dimension 0; `mine` are the rows of this process, on any device. Processes that hold none return at once. If there is
    no memory for the whole tensor, its rows are received nevertheless, so that nobody waits, and MemoryError is raised.
    """
    holders = range(first, first + len(counts))
    if to not in holders or world.rank not in holders:
        return None
    rows = mine.detach().cpu().contiguous()
    if world.rank != to:
        if len(rows):
            with world.guarded():
                dist.send(rows, to, group=world.group)
        return None
    whole, refused = None, None
    try:
        whole = torch.empty((sum(counts), *rows.shape[1:]), dtype=rows.dtype)
    except RuntimeError as error:
        refused = str(error)
    begin = 0
    for holder, count in zip(holders, counts, strict=True):
        part = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype) if whole is None else whole.narrow(0, begin, count)
        begin += count
        if holder == to:
            part.copy_(rows)
        elif count:
            with world.guarded():
                dist.recv(part, holder, group=world.group)
    if whole is None:
        raise MemoryError(refused)
    return whole


def _fetch(tensors: Mapping[str, Tensor | TensorSlices], names: list[str], *, to: int, keep: bool) -> dict[str, Tensor] | MemoryError:
    """The whole tensors on the CPU, or why they have no room; without `keep` only send the slices of this process and return nothing."""
    kept: dict[str, Tensor] = {}
    refused: MemoryError | None = None
    for name in names:
        tensor = tensors[name]
        try:
            whole = tensor.fetch(to) if isinstance(tensor, TensorSlices) else _on_cpu(tensor) if keep else None
            if keep and whole is not None and refused is None:
                kept[name] = whole
        except MemoryError as error:  # of the process that receives; one that cannot send must end, or others would wait for it
            kept, refused = {}, error
    return kept if refused is None else refused


def _on_cpu(tensor: Tensor) -> Tensor:
    """Raises MemoryError."""
    try:
        return tensor.detach().cpu().contiguous()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(str(error)) from error
