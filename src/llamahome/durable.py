"""Every file operation that must survive a crash: write, flush, rename, replace, remove.

Checkpoints, manifests, metrics, indexes, row stores and exports use these functions. The rule behind all of them: content is flushed
before the rename that gives it its name, and the folder is flushed after the rename. So a name never stands for half a file, whether the
process is killed, the power fails, or the disk fills up. `observer` sees each operation before it happens.
On NFS a rename is atomic on the server, but other machines may see the old name for some seconds (docs/Reliability.md).
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from llamahome.progress_marks import FLUSHING, marks

Operation = Literal["write", "flush", "flush folder", "rename", "link", "remove"]

_REMAINS = re.compile(r"\.(\d+)(-\d+)?\.tmp")
"""The end of the names of files and folders that a process, or one of its threads, has not finished."""

observer: Callable[[Operation, Path, Path | None], None] | None = None
"""Called before each operation with the path that it changes and, for a rename or link, its source. What it raises happens instead of the
operation: tests record, fail and kill here."""


def write(path: Path, content: bytes | str) -> None:
    """Write a file of a folder that has no final name yet, and flush it. Text is UTF-8."""
    _observe("write", path)
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        flush_open(file, path)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Write `content` at byte `offset` of an existing file and flush it. Not atomic: only for content that a checksum guards."""
    _observe("write", path)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
        flush_open(file, path)


def write_whole(path: Path, content: bytes | str, *, flush: bool = True) -> None:
    """Write a file that readers see with its old content or with all of the new. Text is UTF-8."""
    with replacing(path, flush=flush) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, *, mode: Literal["wb", "w"] = "wb", flush: bool = True) -> Iterator[IO[Any]]:
    """A file beside `path` to write into; it takes the name `path` when the block ends, and is removed when the block fails.

    Without `flush` a power cut may leave an empty file: only for what is written again within seconds.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _observe("write", partial)
        with partial.open(mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            if flush:
                flush_open(file, partial)
        rename(partial, path, flush=flush)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing, cannot be read or holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def flush_open(file: IO[Any], path: Path) -> None:
    """Flush an open file and its buffer to the disk."""
    _observe("flush", path)
    with marks.allowing(FLUSHING):
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Flush a file that another library has written."""
    _observe("flush", path)
    with path.open("rb") as file, marks.allowing(FLUSHING):
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the names in `folder`, as POSIX requires after a rename or a new file."""
    _observe("flush folder", folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with marks.allowing(FLUSHING):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder`."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in sorted(names):
            flush(Path(parent, name))
        flush_folder(Path(parent))


def rename(source: Path, target: Path, *, flush: bool = True) -> None:
    """Give `source` the name `target`; a file of that name is replaced. This commits what `source` holds."""
    _observe("rename", target, source)
    source.replace(target)
    if flush:
        flush_folder(target.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename the folder `partial` to `folder`. What has that name already is moved away first and removed afterwards."""
    aside = trash(folder)
    if folder.exists():
        remove_tree(aside)
        rename(folder, aside, flush=False)
    try:
        rename(partial, folder)
    except OSError:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise
    with suppress(OSError):
        remove_tree(aside)


def trash(folder: Path) -> Path:
    """The name that `folder` has while it is removed; what still has it after a crash is removed by the next who looks."""
    return folder.with_name(f".trash-{folder.name}")


def remove_folder(folder: Path) -> None:
    """Remove `folder` in two steps, so that half of it never has its name. Raises OSError."""
    aside = trash(folder)
    remove_tree(aside)
    rename(folder, aside)
    remove_tree(aside)


def remove_tree(folder: Path) -> None:
    """Remove a folder that no reader looks at; nothing happens if it does not exist. Raises OSError."""
    if folder.exists():
        _observe("remove", folder)
        shutil.rmtree(folder)


def remove_remains(folder: Path, pattern: str) -> None:
    """Remove what processes that were killed have left in `folder`: names of `pattern` that end with `.PID.tmp`, if no process PID runs.

    Process numbers are those of this machine. If another machine writes there at the same moment, its writing fails with an OSError.
    """
    for remains in folder.glob(pattern):
        process = _REMAINS.search(remains.name)
        if process is None or process.end() != len(remains.name) or is_running(int(process[1])):
            continue
        if remains.is_dir():
            shutil.rmtree(remains, ignore_errors=True)
        else:
            with suppress(OSError):
                remains.unlink()


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def link(source: Path, target: Path) -> None:
    """Give a file that is never changed again a second name; copy and flush it if the disk has no hard links."""
    _observe("link", target, source)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        flush(target)


def _observe(operation: Operation, path: Path, source: Path | None = None) -> None:
    if observer is not None:
        observer(operation, path, source)
