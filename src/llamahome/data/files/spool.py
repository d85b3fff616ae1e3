"""Files that can only be read from the beginning, written once into the cache in a form in which any place can be reached.

Archives (.gz, .zst) are unpacked and large Parquet files become Arrow, under data/training/processed/spool/. A copy is whole or not there
(one rename), belongs to one state of its file (its name), is made by one process while others wait, and never fills the disk.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from llamahome.data.files.disguise import real_kind, text_under
from llamahome.data.files.index import Tell, cache_name, forget_older
from llamahome.data.files.watch import WatchedFile
from llamahome.errors import DataError, MachineError, Problem
from llamahome.lfs import is_pointer, lfs_problem
from llamahome.rundir import PROCESSED_DATA
from llamahome.units import show_bytes

PACKED = {".gz": "gzip", ".zst": "zstd"}
_LEFT_FREE = 1 << 28
"""Bytes (256 MiB) of the disk that a copy leaves to others."""
_AT_A_TIME = 1 << 22
_HEAD = 1 << 16

Fill = Callable[[BinaryIO, Callable[[], None]], None]
"""Writes the copy; the second argument is called between writes and raises when the disk runs full."""


def unpacked(path: str, tell: Tell) -> WatchedFile:
    """The content of an archive, unpacked when it is not yet; raises DataError for one that is torn, MachineError without room."""
    if is_pointer(path):
        raise DataError(lfs_problem(path))
    archive = WatchedFile(path)

    def fill(sink: BinaryIO, room: Callable[[], None]) -> None:
        for part in _parts(archive):
            sink.write(part)
            room()

    return WatchedFile(path, place=copy_once(archive, "unpacked", fill, tell=tell, least=archive.size))


def _parts(archive: WatchedFile) -> Iterator[bytes]:
    codec = PACKED[Path(archive.path).suffix.lower()]
    try:
        with pa.OSFile(archive.place) as raw, pa.CompressedInputStream(raw, codec) as stream:
            while part := stream.read(_AT_A_TIME):
                yield part
    except OSError as error:
        quoted = shlex.quote(archive.path)
        ends = "Truncated" in str(error)
        message = "the archive ends too early" if ends else f"the archive cannot be unpacked: {error}"
        hint: str | None = (
            f"copy or download it again; it is whole when this says nothing: {'gzip' if codec == 'gzip' else 'zstd'} -t {quoted}"
        )
        head = archive.read(0, min(_HEAD, archive.size))
        other = text_under(archive.path, head) if real_kind(head) != codec else None
        if other is not None:
            message, hint = f"the archive cannot be unpacked: {other[0]}", other[1]
        code = "data.bad-gzip" if codec == "gzip" else "data.bad-zst"
        raise DataError(Problem(code=code, message=message, where=archive.path, hint=hint)) from error


def copy_once(file: WatchedFile, kind: str, fill: Fill, *, tell: Tell, least: int) -> str:
    """Where the copy of `file` lies, made by `fill` when it is not there; `least` bytes must be free to begin. Raises MachineError."""
    folder, name = PROCESSED_DATA / "spool", cache_name(file, kind)
    if found := _standing(folder, name):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if found := _standing(folder, name):
                return found
            tell(f"{file.path}: writing it once, {kind}, to {folder}")
            made = _make(file, folder, name, fill, least)
            forget_older(folder, name)
            (folder / f"{name}.lock").unlink(missing_ok=True)
            return made
    except OSError as error:
        raise MachineError(_cannot_copy(file, folder, error)) from error


def _standing(folder: Path, name: str) -> str | None:
    """A copy of the size that its name tells."""
    for path in folder.glob(f"{name}-*"):
        with contextlib.suppress(OSError):
            if path.name == f"{name}-{path.stat().st_size}":
                return str(path)
    return None


def _make(file: WatchedFile, folder: Path, name: str, fill: Fill, least: int) -> str:
    partial = folder / f"{name}.{os.getpid()}.tmp"

    def room(wanted: int = 0) -> None:
        if shutil.disk_usage(folder).free < wanted + _LEFT_FREE:
            raise MachineError(_cannot_copy(file, folder, None))

    room(least)
    try:
        with partial.open("wb") as sink:
            fill(sink, room)
            sink.flush()
            os.fsync(sink.fileno())
        file.check()
        target = folder / f"{name}-{partial.stat().st_size}"
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return str(target)


def _cannot_copy(file: WatchedFile, folder: Path, error: OSError | None) -> Problem:
    codec = PACKED.get(Path(file.path).suffix.lower())
    program = {"gzip": "gzip -dc", "zstd": "zstd -dc"}.get(codec or "", "")
    elsewhere = f"{program} {shlex.quote(file.path)} > {shlex.quote(Path(file.path).stem)}   on a disk with room" if codec else None
    if error is not None and not isinstance(error, PermissionError) and error.errno not in (28, 122):
        message = f"cannot write a copy under {folder}: {error.strerror}"
        return Problem(code="machine.cache-not-writable", message=message, where=file.path, hint=elsewhere)
    if isinstance(error, PermissionError):
        message = f"cannot write a copy under {folder}: {error.strerror}"
        return Problem(code="machine.cache-not-writable", message=message, where=file.path, hint=f"chmod u+rwx {folder}")
    free = show_bytes(shutil.disk_usage(folder).free)
    message = f"no room for a copy under {folder}: {free} are free, {show_bytes(_LEFT_FREE)} of them are left to others"
    return Problem(code="machine.disk-full", message=message, where=file.path, hint=elsewhere or "free space there, or give JSONL instead")
