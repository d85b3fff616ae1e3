"""Git LFS pointers: the few lines of text that stand in the place of a file whose content was not downloaded.

Source: the specification of Git LFS, version 1. Cost: one read of at most 1 KiB.
"""

import shlex
from pathlib import Path

from llamahome.errors import Problem

_FIRST = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LARGEST = 1024
"""Bytes; the specification allows a pointer no more."""


def is_pointer(path: str | Path) -> bool:
    """Whether the file is a pointer instead of what its name says; False when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return is_pointer_text(file.read(_LARGEST + 1))
    except OSError:
        return False


def is_pointer_text(content: bytes) -> bool:
    """Whether these bytes, the first of a file, are a whole pointer."""
    return content.startswith(_FIRST) and len(content) <= _LARGEST and b"\noid " in content


def pull_command(path: Path) -> str | None:
    """The command that fetches what the pointers beside `path` stand for; None where no clone is around it."""
    folder = path if path.is_dir() else path.parent
    if not any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents)):
        return None
    return f"git -C {shlex.quote(str(folder))} lfs pull"


def lfs_problem(path: str | Path) -> Problem:
    """The problem of a pointer in the place of rows, with the command that downloads what it stands for."""
    hint = pull_command(Path(path)) or "git lfs pull, in the clone that the file comes from"
    message = "this is a Git LFS pointer: the content of the file was not downloaded"
    return Problem(code="data.lfs-pointer", message=message, where=str(path), hint=hint)
