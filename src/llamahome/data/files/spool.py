"""Copies files that can only be read from the beginning into the cache, once, in a form in which any part can be read.

Archives (.gz, .zst) are unpacked and large Parquet files become Arrow, under data/training/processed/spool/. A copy is complete or absent
(one rename) and belongs to one state of its file (its name). One process makes it while others wait, and it never fills the disk.
"""

import contextlib
import errno
import io
import os
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow as pa

from llamahome import durable
from llamahome.data.files.guarded_file import LIMITS, GuardedFile, ReaderLimits
from llamahome.data.files.index import Notify, cache_name, remove_older
from llamahome.data.files.lock import wait_for_lock
from llamahome.data.files.signatures import real_content, real_kind
from llamahome.errors import DataError, MachineError, Problem
from llamahome.lfs import is_pointer, lfs_problem
from llamahome.progress_marks import marks
from llamahome.rundir import PROCESSED_DATA
from llamahome.units import many, show_bytes

PACKED = {".gz": "gzip", ".zst": "zstd"}
_GZIP = 31
"""The window bits of zlib that mean gzip."""
_PART = 1 << 20

Fill = Callable[[BinaryIO, Callable[[], None]], None]
"""Writes the copy; it calls its second argument between writes, which raises if the disk runs full."""


def unpacked(path: str, notify: Notify, limits: ReaderLimits = LIMITS) -> GuardedFile:
    """The content of an archive, unpacked if it is not yet. Raises DataError for a damaged archive, MachineError without room."""
    if is_pointer(path):
        raise DataError(lfs_problem(path))
    archive = GuardedFile(path, limits=limits)

    def fill(sink: BinaryIO, require_room: Callable[[], None]) -> None:
        for part in _decompressed(archive):
            sink.write(part)
            require_room()

    place = copy_once(archive, "unpacked", fill, notify=notify, least=archive.size)
    return GuardedFile(path, place=place, limits=limits)


def content_place(path: str) -> str:
    """Where the bytes of the file can be read: the file itself, or the unpacked copy of an archive; raises as unpacked does."""
    return str(unpacked(path, lambda _: None).place) if Path(path).suffix.lower() in PACKED else path


@contextlib.contextmanager
def text_to(place: Path, name: str) -> Iterator[TextIO]:
    """A file of UTF-8 text to write, compressed if `name` ends in .gz or .zst."""
    codec = PACKED.get(Path(name).suffix.lower())
    if codec is None:
        with place.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        return
    with pa.OSFile(str(place), "wb") as raw, pa.CompressedOutputStream(raw, codec) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


def _decompressed(archive: GuardedFile) -> Iterator[bytes]:
    codec = PACKED[Path(archive.path).suffix.lower()]
    try:
        with pa.OSFile(archive.place) as raw, pa.CompressedInputStream(raw, codec) as stream:
            while part := stream.read(archive.limits.block):
                yield part
    except OSError as error:
        truncated = "Truncated" in str(error)
        message = "the archive ends too early" if truncated else f"the archive cannot be unpacked: {error}"
        hint: str | None = f"copy or download it again; it is whole if this prints nothing: {codec} -t {shlex.quote(archive.path)}"
        head = archive.head()
        real = real_content(archive.path, head) if real_kind(head) != codec else None
        if real is not None:
            message, hint = f"the archive cannot be unpacked: {real[0]}", real[1]
        elif codec == "gzip" and (extra := _after_gzip(archive.place)):
            message = f"the archive is whole, and {many(extra, 'byte')} that are not gzip follow it"
            target = shlex.quote(str(Path(archive.path).with_suffix("")))
            hint = f"gzip -dcq {shlex.quote(archive.path)} > {target}   unpacks what is before them"
        code = "data.bad-gzip" if codec == "gzip" else "data.bad-zst"
        raise DataError(Problem(code=code, message=message, where=archive.path, hint=hint)) from error


def _after_gzip(place: str) -> int:
    """The number of bytes after the last whole member of a gzip file; 0 if a member is damaged or nothing follows."""
    size, whole, rest = 0, 0, b""
    member = zlib.decompressobj(_GZIP)
    with Path(place).open("rb") as file, contextlib.suppress(zlib.error):
        while part := rest or file.read(_PART):
            if whole and size == whole and not part.startswith(b"\x1f"):
                return Path(place).stat().st_size - whole
            member.decompress(part)
            rest = member.unused_data
            size += len(part) - len(rest)
            if member.eof:
                whole, member = size, zlib.decompressobj(_GZIP)
    return 0


def copy_once(file: GuardedFile, kind: str, fill: Fill, *, notify: Notify, least: int) -> str:
    """Where the copy of `file` is; `fill` makes it if it is missing, and `least` bytes must be free to begin. Raises MachineError."""
    folder, name = PROCESSED_DATA / "spool", cache_name(file, kind)
    if copy := _existing(folder, name):
        return copy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as lock:
            wait_for_lock(lock.fileno(), lambda: _sizes(folder, f"{name}.*.tmp"))
            if copy := _existing(folder, name):
                return copy
            durable.remove_remains(folder, "*.tmp")
            notify(f"{file.path}: writing it once, {kind}, to {folder}")
            copy = _make(file, folder, name, fill, least)
            remove_older(folder, name)
            (folder / f"{name}.lock").unlink(missing_ok=True)
            return copy
    except OSError as error:
        raise MachineError(_cannot_copy(file, folder, error)) from error


def _existing(folder: Path, name: str) -> str | None:
    """A copy whose size is the one in its name."""
    for path in folder.glob(f"{name}-*"):
        with contextlib.suppress(OSError):
            if path.name == f"{name}-{path.stat().st_size}":
                return str(path)
    return None


def _sizes(folder: Path, pattern: str) -> list[int]:
    """Of the copies that are being written."""
    sizes = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return sizes


def _make(file: GuardedFile, folder: Path, name: str, fill: Fill, least: int) -> str:
    partial = folder / f"{name}.{os.getpid()}.tmp"

    def require_room(size: int = 0) -> None:
        marks.advance()
        if shutil.disk_usage(folder).free < size + file.limits.free_disk:
            raise MachineError(_cannot_copy(file, folder, None))

    require_room(least)
    try:
        with partial.open("wb") as sink:
            fill(sink, require_room)
            durable.flush_open(sink, partial)
        file.check()
        target = folder / f"{name}-{partial.stat().st_size}"
        durable.rename(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return str(target)


def _cannot_copy(file: GuardedFile, folder: Path, error: OSError | None) -> Problem:
    """The problem of a folder that cannot be written, or of a full disk (no error, or one that says so)."""
    codec = PACKED.get(Path(file.path).suffix.lower())
    unpack = f"{codec} -dc {shlex.quote(file.path)} > {shlex.quote(Path(file.path).stem)}   on a disk with room" if codec else None
    if error is not None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        message = f"cannot write a copy under {folder}: {error.strerror}"
        hint = f"chmod u+rwx {folder}" if isinstance(error, PermissionError) else unpack
        return Problem(code="machine.cache-not-writable", message=message, where=file.path, hint=hint)
    free, kept_free = show_bytes(shutil.disk_usage(folder).free), show_bytes(file.limits.free_disk)
    message = f"no room for a copy under {folder}: {free} are free, and {kept_free} of them must stay free"
    return Problem(code="machine.disk-full", message=message, where=file.path, hint=unpack or "free space there, or give JSONL instead")
