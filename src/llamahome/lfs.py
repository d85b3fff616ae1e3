"""Git LFS pointers: three lines of text that stand in a clone where a large file was not fetched.

Source: the specification of Git LFS, version 1.
"""

import shlex
from pathlib import Path

_FIRST_LINE = b"version https://git-lfs.github.com/spec/v1"
_LARGEST = 1024
"""Bytes that a pointer may have."""


def is_pointer(path: Path) -> bool:
    """Whether the file is a pointer instead of what its name says; False when it cannot be read."""
    try:
        if path.stat().st_size >= _LARGEST:
            return False
        with path.open("rb") as file:
            return file.read(len(_FIRST_LINE)) == _FIRST_LINE
    except OSError:
        return False


def pull_command(path: Path) -> str | None:
    """The command that fetches what the pointers beside `path` stand for; None where no clone is around it."""
    folder = path if path.is_dir() else path.parent
    if not any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents)):
        return None
    return f"git -C {shlex.quote(str(folder))} lfs pull"
