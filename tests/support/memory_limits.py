"""A control group with a limit of memory, for processes that are started in it; version 1 and 2."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def memory_limit(nbytes: int) -> Iterator[Callable[[], None] | None]:
    """A function that puts the calling process under a limit, for subprocess's preexec_fn; None where no group can be made.

    All processes in it must have ended when the block is left.
    """
    folder = _limit_file().parent
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        try:
            change_limit(nbytes)
        except OSError:
            yield None
            return
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii") and None
    finally:
        folder.rmdir()


def change_limit(nbytes: int) -> None:
    """Give the group of `memory_limit` another limit while it runs; OSError if what cannot be taken back is larger."""
    _limit_file().write_text(str(nbytes), encoding="ascii")


def _limit_file() -> Path:
    version_1 = (_ROOT / "memory").is_dir()
    top, name = (_ROOT / "memory", "memory.limit_in_bytes") if version_1 else (_ROOT, "memory.max")
    return top / f"llamahome-test-{os.getpid()}" / name
