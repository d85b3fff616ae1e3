"""Tensors that lie whole or in pieces on the processes, to safetensors files of whole tensors that several processes write at once.

So a file does not tell how many processes wrote it nor how the weights lay: any number of them reads it. A piece costs one exchange, and a
writer holds one file of whole tensors in memory at a time.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

LARGEST_FILE = 4 * 2**30
"""Bytes; also the most that a writer gathers at a time."""


@dataclass(frozen=True)
class Pieces:
    """A tensor of which each process holds a piece."""

    nbytes: int
    """Of the whole."""
    fetch: Callable[[], Tensor]
    """Returns the whole; all processes call it, in the same order."""


@dataclass(frozen=True)
class Part:
    """The share of a process in what is written."""

    number: int
    """-1 takes part in exchanges and writes nothing."""
    count: int
    """Processes that write."""


WRITES_ALL = Part(0, 1)
TAKES_PART = Part(-1, 1)


@dataclass(frozen=True)
class Written:
    """What several processes wrote together."""

    file_of: dict[str, str]
    """Name of each tensor to the name of its file."""
    mine: list[Path]
    """What this process wrote."""


def plan_files(sizes: Mapping[str, int], *, writers: int, largest: int = LARGEST_FILE) -> list[list[str]]:
    """Names of each file, balanced by size: as many files as writers, or a multiple where files would be too large; none is empty."""
    rounds = max(1, -(-sum(sizes.values()) // (largest * writers)))
    loads: list[tuple[int, int]] = [(0, number) for number in range(rounds * writers)]
    files: list[list[str]] = [[] for _ in loads]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, number = loads[0]
        files[number].append(name)
        heapq.heapreplace(loads, (load + sizes[name], number))
    return [sorted(names) for names in files if names]


def write_files(
    folder: Path, stem: str, tensors: Mapping[str, Tensor | Pieces], *, part: Part, metadata: Mapping[str, str] | None = None
) -> Written:
    """Write this process's share of `tensors`, as `stem`.safetensors or as several numbered files.

    All processes call it with the same names; those without a share still give their pieces, and so does one whose disk refuses to
    write: its OSError or SafetensorError comes at the end.
    """
    files = plan_files({name: tensor.nbytes for name, tensor in tensors.items()}, writers=part.count)
    names = [f"{stem}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    queue = list(zip(names if len(files) > 1 else [f"{stem}.safetensors"], files, strict=False))
    mine: list[Path] = []
    failed: list[Exception] = []
    for start in range(0, len(queue), part.count):
        turn = queue[start : start + part.count]
        fetched = [_fetch(tensors, members, keep=number == part.number) for number, (_, members) in enumerate(turn)]
        if 0 <= part.number < len(turn):  # after everything of this turn was fetched, so that all write at once
            mine.append(folder / turn[part.number][0])
            try:
                safetensors.torch.save_file(fetched[part.number], mine[-1], metadata=dict(metadata or {}))
            except (OSError, safetensors.SafetensorError) as error:
                failed.append(error)
    if failed:
        raise failed[0]
    return Written({member: name for name, members in queue for member in members}, mine)


def _fetch(tensors: Mapping[str, Tensor | Pieces], names: list[str], *, keep: bool) -> dict[str, Tensor]:
    kept = {}
    for name in names:
        tensor = tensors[name]
        if isinstance(tensor, Pieces):
            whole = tensor.fetch()
        elif keep:
            whole = tensor
        else:
            continue
        if keep:
            kept[name] = whole.detach().cpu().contiguous()
    return kept
