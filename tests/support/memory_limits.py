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
    version_1 = (_ROOT / "memory").is_dir()
    top, limit = (_ROOT / "memory", "memory.limit_in_bytes") if version_1 else (_ROOT, "memory.max")
    folder = top / f"llamahome-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        try:
            (folder / limit).write_text(str(nbytes), encoding="ascii")
        except OSError:
            yield None
            return
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii") and None
    finally:
        folder.rmdir()
