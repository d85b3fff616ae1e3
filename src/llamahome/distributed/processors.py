"""The number of CPUs and cores that this process may use, by its affinity mask and control group, and settings of torch's CPU threads.

The settings are environment variables that torch reads when it is imported.
"""

import ctypes
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from llamahome.distributed.control_groups import processor_quota, read_words

_SPIN_COUNT = "1000"
"""Iterations that an OpenMP thread spins before it sleeps. measured on two CPUs (docs/log.md): next to two other busy processes, 4 to 10
times as fast as with the default of 300,000, because spinning threads take the CPU from the thread that they wait for."""

_CACHE_VARIABLES, _CACHED_KERNELS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), "64"
"""Number of compiled kernels that torch and oneDNN cache with their buffers; the default is 1,024. measured (docs/log.md): every new
number of tokens added 25 MB, gigabytes in the end, that no later step used; with 64 memory stays flat at the same speed."""

_TRIM, _MAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt."""
_KEPT_BYTES, _RETURNED_BYTES = 2**30, 2**19
_ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def share_processors(environment: MutableMapping[str, str]) -> None:
    """Let torch's threads spin only briefly; call it before torch is imported. OMP_WAIT_POLICY or GOMP_SPINCOUNT take precedence."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


def bound_caches(environment: MutableMapping[str, str]) -> None:
    """Limit the kernels that torch caches, one per shape; call it before torch is imported. Variables of the user take precedence."""
    for name in _CACHE_VARIABLES:
        environment.setdefault(name, _CACHED_KERNELS)


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let glibc keep the memory that a step frees for the next step, because the system would have to clear every page of it again.

    measured (docs/log.md): it saves 0.1 of 2.7 CPU seconds of a step of 1,536 tokens. Does nothing, and returns False, without glibc or
    if the user has set an option of the allocator.
    """
    if sys.platform != "linux" or any(name in environment for name in _ALLOCATOR_VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, _KEPT_BYTES) for option in (_MAP, _TRIM))


def return_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let glibc give large tensors back when they are freed, which undoes `keep_freed_memory`, for runs whose memory is short.

    What was freed before goes back at once (30 MiB after the starter was loaded).
    measured (docs/log.md): a row of 8,192 tokens through four layers took 310 MiB instead of 439, because gaps between kept blocks of
    memory fit no larger one.
    """
    if sys.platform != "linux" or any(name in environment for name in _ALLOCATOR_VARIABLES):
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and libc.mallopt(_MAP, _RETURNED_BYTES) and libc.mallopt(_TRIM, _RETURNED_BYTES)):
        return False
    libc.malloc_trim(ctypes.c_size_t(0))
    return True


def usable_cpus(*, root: Path = Path("/")) -> int:
    """Number of CPUs, at least 1. A container's quota of 1.5 CPUs counts as 1, because a second thread would be stopped half of the time.

    `root` is the folder that contains proc and sys.
    """
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = processor_quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def usable_cores(*, root: Path = Path("/")) -> int:
    """Number of cores, at least 1. Two CPUs of one core (SMT) count once, because one thread with matrix products uses a whole core."""
    if sys.platform != "linux":
        return usable_cpus(root=root)
    cores = {_siblings(root, number) for number in os.sched_getaffinity(0)}
    return min(len(cores), usable_cpus(root=root))


def _siblings(root: Path, number: int) -> str:
    """The CPUs that share a core with CPU `number`, as the system writes them; `number` if it does not."""
    folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
    lists = (read_words(folder / name) for name in ("core_cpus_list", "thread_siblings_list"))
    return next((" ".join(words) for words in lists if words), str(number))
