"""The pages of memory-mapped weights: which bytes of a file they are, read ahead of their use, and given back to the system after it.

A weight is found by its address in the memory map of this process (/proc/self/smaps of Linux). Pages are given back only if the process has
changed none of the mapping, so the file still holds what they held. Elsewhere than on Linux no weight is found.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_PAGE = os.sysconf("SC_PAGE_SIZE")
_SMAPS = Path("/proc/self/smaps")
_AT_ONCE = 1 << 19
"""Bytes that the system is asked to read in one call; it reads no more than its read-ahead for larger calls."""
_LOCKED = 1 << 22
"""Bytes that one call maps or gives back; meanwhile the passes can map no memory."""
_DONTNEED, _POPULATE_READ = 4, 22
"""Of madvise(2); the second exists from Linux 5.14 on."""


@dataclass(frozen=True)
class Mapping:
    """A file in the memory of this process."""

    start: int
    end: int
    offset: int
    """Of `start` in the file, in bytes."""
    path: str


@dataclass(frozen=True)
class Pages:
    """Contiguous bytes of a file that lie in memory at `address`."""

    path: str
    offset: int
    address: int
    nbytes: int

    def read(self) -> None:
        """Read them from the file and map them; returns when they are there. Errors are left to whoever uses the weights."""
        with contextlib.suppress(OSError), Path(self.path).open("rb", buffering=0) as file:
            for start in range(self.offset, self.offset + self.nbytes, _AT_ONCE):
                os.posix_fadvise(file.fileno(), start, _AT_ONCE, os.POSIX_FADV_WILLNEED)
            if (
                _advise(_outwards(self.address, self.nbytes), _POPULATE_READ) == errno.EINVAL
            ):  # an older system: read them once, so that they are in its cache
                buffer, end = bytearray(_AT_ONCE), self.offset + self.nbytes
                for start in range(self.offset, end, _AT_ONCE):
                    os.preadv(file.fileno(), [memoryview(buffer)[: min(_AT_ONCE, end - start)]], start)

    def drop(self) -> None:
        """Give their memory back: the pages of this process, and those of the system's cache that no other process has mapped."""
        _advise(_inwards(self.address, self.nbytes), _DONTNEED)
        with contextlib.suppress(OSError), Path(self.path).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)


def unchanged_mappings() -> list[Mapping]:
    """The files that are mapped in this process, but for those of which it has changed a page."""
    try:
        lines = _SMAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found: list[Mapping] = []
    for line in lines:
        words = line.split(None, 5)
        if words and words[0] == "Anonymous:" and found and words[1] != "0":
            found.pop()
        if len(words) < 5 or "-" not in words[0] or words[0].endswith(":"):
            continue
        start, end = (int(word, 16) for word in words[0].split("-"))
        found.append(Mapping(start, end, int(words[2], 16), words[5] if len(words) == 6 else ""))
    return [mapping for mapping in found if mapping.path.startswith("/")]


def pages_of(tensors: Iterable[Tensor], mappings: list[Mapping]) -> list[Pages]:
    """The bytes of those `tensors` that lie in a file, in the order of the file, neighbours joined; each byte once."""
    found = {page for tensor in tensors for page in _pages(tensor, mappings)}
    joined: list[Pages] = []
    for pages in sorted(found, key=lambda each: (each.path, each.offset)):
        last = joined[-1] if joined else None
        end = None if last is None else last.offset + last.nbytes
        if last is not None and last.path == pages.path and end is not None and pages.offset - end < _PAGE:
            nbytes = max(end, pages.offset + pages.nbytes) - last.offset
            joined[-1] = Pages(last.path, last.offset, last.address, nbytes)
        else:
            joined.append(pages)
    return joined


def _pages(tensor: Tensor, mappings: list[Mapping]) -> list[Pages]:
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return []
    address, nbytes = tensor.data_ptr(), tensor.nbytes
    inside = (each for each in mappings if each.start <= address and address + nbytes <= each.end)
    return [Pages(each.path, each.offset + address - each.start, address, nbytes) for each in inside]


def _advise(span: range, advice: int) -> int:
    """0, or the number of the first error. In small parts, because the memory map is locked in each of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    for start in range(span.start, span.stop, _LOCKED):
        nbytes = min(_LOCKED, span.stop - start)
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), ctypes.c_int(advice)):
            return ctypes.get_errno()
    return 0


def _outwards(address: int, nbytes: int) -> range:
    return range(address // _PAGE * _PAGE, -(-(address + nbytes) // _PAGE) * _PAGE)


def _inwards(address: int, nbytes: int) -> range:
    return range(-(-address // _PAGE) * _PAGE, (address + nbytes) // _PAGE * _PAGE)
