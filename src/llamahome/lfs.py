"""Git LFS pointers: the few lines of text that a clone has instead of a file whose content was not downloaded.

Source: the specification of Git LFS, version 1. Cost: one read of at most 1 KiB.
"""

import shlex
from pathlib import Path

from llamahome.errors import Problem

_FIRST = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LARGEST = 1024
"""Bytes; the specification allows no larger pointer."""


def is_pointer(path: str | Path) -> bool:
    """Whether the file is a pointer instead of real content; False if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return is_pointer_text(file.read(_LARGEST + 1))
    except OSError:
        return False


def is_pointer_text(content: bytes) -> bool:
    """Whether `content`, the first bytes of a file, is a complete pointer."""
    return content.startswith(_FIRST) and len(content) <= _LARGEST and b"\noid " in content


def pull_command(path: Path) -> str | None:
    """The command that downloads the content of the pointers at `path`; None if `path` is in no clone."""
    folder = path if path.is_dir() else path.parent
    if not any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents)):
        return None
    return f"git -C {shlex.quote(str(folder))} lfs pull"


def lfs_problem(path: str | Path) -> Problem:
    """The problem that a file of rows is a pointer, with the command that downloads the content."""
    hint = pull_command(Path(path)) or "git lfs pull, in the clone that the file comes from"
    message = "this is a Git LFS pointer: the content of the file was not downloaded"
    return Problem(code="data.lfs-pointer", message=message, where=str(path), hint=hint)
