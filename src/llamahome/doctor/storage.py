"""Checks the folders that a run writes: whether they can be written, how much room they have, and how fast they are.

Standard library only. A file of a check is unlinked before it is filled, so nothing stays behind even if the check is killed.
"""

import errno
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamahome.doctor.checks import Check, failed, passed, warned
from llamahome.units import show_bytes

_PIECE, _PIECES = 4 * 2**20, 8
_SLOW_DISK, _SLOW_COPY = 20e6, 1e9
"""Bytes a second: at 20 MB/s the checkpoint of a LoRA run of the starter (60 MB) takes 3 s; any machine since 2005 copies 1 GB/s."""
_MIB, _GIB = 2**20, 2**30
_COPIED = 64 * 2**20


@dataclass(frozen=True)
class Purpose:
    """What a folder is for, and how much room it needs."""

    name: str
    least: int
    """Bytes below which work fails."""
    enough: int
    """Bytes below which it soon will."""
    consequence: str
    help: str | None = None
    """A command that uses another folder; {} is a folder with room."""
    essential: bool = True
    """Whether nothing works if it cannot be written."""


@dataclass(frozen=True)
class Folder:
    """What was found at a folder, or at the nearest one that exists."""

    path: str
    existing: str
    """Where it was tried: `path`, or its nearest parent that exists."""
    writable: bool
    reason: str
    """Why it cannot be written."""
    free: int
    """Bytes that this user may fill."""
    free_files: int
    """Inodes; -1 where the file system has no limit."""


PURPOSES = {
    "output": Purpose(
        "output-folder", 200 * _MIB, 2 * _GIB, "runs and checkpoints are written there", "export LLAMAHOME_OUTPUT__DIR={}/run"
    ),
    "processed": Purpose(
        "processed-data",
        50 * _MIB,
        _GIB,
        "tokenized rows are kept there, unless they are made while training",
        "export LLAMAHOME_DATA__STREAMING=true",
        essential=False,
    ),
    "cache": Purpose(
        "cache-folder",
        20 * _MIB,
        500 * _MIB,
        "compiled passes and indexes of data files are kept there, and otherwise made again by every run",
        "export XDG_CACHE_HOME={}/cache",
        essential=False,
    ),
    "temporary": Purpose("temporary-folder", 50 * _MIB, 500 * _MIB, "the compiler and other libraries write there", "export TMPDIR={}"),
    "shared-memory": Purpose(
        "shared-memory", _MIB, 64 * _MIB, "processes of one machine exchange through it (docker: --shm-size)", essential=False
    ),
}


def read_folder(path: Path) -> Folder:
    """Try to write a file of 1 MiB in `path`, or in its nearest parent that exists; nothing stays behind."""
    existing = next((each for each in (path, *path.absolute().parents) if _exists(each)), Path("/"))
    reason, free, files = "", 0, -1
    try:
        system = os.statvfs(existing)
        free, files = system.f_bavail * system.f_frsize, system.f_favail if system.f_files else -1
        if not existing.is_dir():
            reason = f"{existing} is a file"
        else:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(b"\0" * _MIB)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = 0
    return Folder(str(path), str(existing), not reason, reason, free, files)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def folder_check(purpose: Purpose, folder: Folder, *, roomy: str | None) -> Check:
    """Whether the folder can be written and has room; `roomy` is another folder that has."""
    help_ = purpose.help.replace("{}", shlex.quote(roomy or "")) if purpose.help and (roomy or "{}" not in purpose.help) else None
    make = failed if purpose.essential else warned
    place = folder.path if folder.path == folder.existing else f"{folder.path} (tried in {folder.existing})"
    if folder.free < purpose.least:
        return make(purpose.name, f"{place} has {show_bytes(folder.free)} free; {purpose.consequence}", help_)
    if not folder.writable:
        return make(purpose.name, f"{place} cannot be written: {folder.reason}; {purpose.consequence}", help_)
    if folder.free_files == 0:
        return make(purpose.name, f"the disk of {place} has no room for one more file (no inodes); {purpose.consequence}", help_)
    if folder.free < purpose.enough:
        return warned(purpose.name, f"{place} has {show_bytes(folder.free)} free; {purpose.consequence}", help_)
    return passed(purpose.name, f"{show_bytes(folder.free)} free in {place}")


@dataclass(frozen=True)
class DiskRate:
    """Bytes a second of a file that is written, flushed to the disk, and read."""

    folder: str
    written: float
    read: float
    """From the disk if the system could be asked to forget what it keeps of the file."""


def measure_disk(folder: Path) -> DiskRate:
    """Write and read 32 MiB in the nearest folder that exists. Raises OSError."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    piece = os.urandom(_PIECE)
    with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(_PIECES):
            file.write(piece)
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(_PIECE):
            pass
        read = time.perf_counter() - started
    size = _PIECE * _PIECES
    return DiskRate(str(folder), size / written, size / read)


def disk_check(name: str, rate: DiskRate) -> Check:
    """Whether checkpoints are written in seconds."""
    detail = f"{rate.folder}: writes {show_bytes(rate.written)}/s to the disk, reads {show_bytes(rate.read)}/s"
    if min(rate.written, rate.read) < _SLOW_DISK:
        return warned(name, f"{detail}; saving and reading will slow a run down", "export LLAMAHOME_CHECKPOINT__EVERY='30 min'")
    return passed(name, detail)


def measure_copies() -> float:
    """Bytes a second that one core copies in memory, the best of four copies of 64 MiB."""
    source, target = bytearray(_COPIED), bytearray(_COPIED)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        target[:] = source
        best = max(best, _COPIED / (time.perf_counter() - started))
    return best


def copy_check(rate: float) -> Check:
    """Whether memory is as fast as that of any machine; a slow one is shared or emulated."""
    detail = f"one core copies {show_bytes(rate)}/s in memory"
    if rate < _SLOW_COPY:
        return warned("memory-copy", f"{detail}: other programs take its time, or the machine is emulated")
    return passed("memory-copy", detail)


def storage_checks(folders: dict[str, Path]) -> Iterator[Check]:
    """A check of each folder of PURPOSES that is in `folders`."""
    found = {name: read_folder(path) for name, path in folders.items()}
    candidates = [*found.values(), *(read_folder(Path(each)) for each in ("/tmp", "/var/tmp", "/dev/shm") if Path(each).is_dir())]
    for name, folder in found.items():
        purpose = PURPOSES[name]
        good = (each for each in candidates if each.writable and each.free >= purpose.enough and each.existing != folder.existing)
        best = max(good, key=lambda each: each.free, default=None)
        yield folder_check(purpose, folder, roomy=None if best is None else str(Path(best.existing).absolute()))
