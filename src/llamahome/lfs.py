"""Git LFS pointers: the few lines of text that stand in the place of a file whose content was not downloaded.

Format: the specification of Git LFS, version 1. Cost: one read of at most 1 KiB.
"""

import shlex
from pathlib import Path

from llamahome.errors import Problem

_FIRST = b"version https://git-lfs.github.com/spec/"
_OLD = b"version https://hawser.github.com/spec/"
_LARGEST = 1024
"""Bytes; the specification allows a pointer no more."""


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether the file is a pointer; False for one that cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return is_pointer_text(file.read(_LARGEST + 1))
    except OSError:
        return False


def is_pointer_text(content: bytes) -> bool:
    """Whether these bytes, the first of a file, are a whole pointer."""
    return content.startswith((_FIRST, _OLD)) and len(content) <= _LARGEST and b"\noid " in content


def lfs_problem(path: str | Path) -> Problem:
    """The problem of a pointer at `path`, with the command that downloads what it stands for."""
    folder = str(Path(path).parent)
    hint = "git lfs pull" if folder == "." else f"(cd {shlex.quote(folder)} && git lfs pull)"
    message = "this is a Git LFS pointer: the content of the file was not downloaded"
    return Problem(code="data.lfs-pointer", message=message, where=str(path), hint=hint)
