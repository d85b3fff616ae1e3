import os
import platform
import subprocess
import sys

import pytest

from llamahome.distributed.processors import bound_caches, share_processors, usable_cores, usable_cpus


def _tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def _sixteen_allowed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/not/seen/from/inside\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            16,
        ),
    ],
)
def test_quota_and_affinity_limit_the_number_of_cpus(tmp_path, files, expected):
    assert usable_cpus(root=_tree(tmp_path, files)) == expected


def _topology(lists, name="core_cpus_list"):
    return {f"sys/devices/system/cpu/cpu{number}/topology/{name}": text + "\n" for number, text in enumerate(lists)}


PAIRS = [f"{number % 8},{number % 8 + 8}" for number in range(16)]
QUOTA_OF_4 = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}


@pytest.mark.parametrize(
    ("files", "allowed", "expected"),
    [
        ({}, range(16), 16),
        (_topology(PAIRS), range(16), 8),
        (_topology(PAIRS, "thread_siblings_list"), range(16), 8),
        (_topology(PAIRS), (0, 8), 1),
        (_topology(PAIRS), (0, 1, 8), 2),
        (_topology([str(number) for number in range(16)]), range(16), 16),
        (_topology(PAIRS) | QUOTA_OF_4, range(16), 4),
        (_topology(PAIRS) | QUOTA_OF_4, (0, 1, 8, 9), 2),
    ],
)
def test_two_cpus_of_one_core_count_once(tmp_path, monkeypatch, files, allowed, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed), raising=False)
    assert usable_cores(root=_tree(tmp_path, files)) == expected


def test_this_machine_has_at_least_one_core():
    assert 1 <= usable_cores() <= usable_cpus()


def test_threads_spin_briefly_unless_the_user_chose():
    untouched, chosen, policy = {}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}
    for environment in (untouched, chosen, policy):
        share_processors(environment)
    assert int(untouched["GOMP_SPINCOUNT"]) < 300_000
    assert chosen == {"GOMP_SPINCOUNT": "7"} and policy == {"OMP_WAIT_POLICY": "active"}


def test_few_kernels_are_cached_unless_the_user_chose():
    untouched, chosen = {}, {"LRU_CACHE_CAPACITY": "7"}
    for environment in (untouched, chosen):
        bound_caches(environment)
    assert set(untouched) == {"LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    assert all(int(value) < 1024 for value in untouched.values()) and chosen["LRU_CACHE_CAPACITY"] == "7"


_FAULTS = """
import os, resource, sys
from llamahome.distributed.processors import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    some = [bytearray(40_000_000) for _ in range(4)]
    del some
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = keep_freed_memory(os.environ)
first = faults()
print(int(kept), first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt exists in glibc only")
def test_freed_memory_is_reused_without_page_faults_unless_the_user_chose():
    pages = 160_000_000 // os.sysconf("SC_PAGE_SIZE")
    results = []
    for chosen in ({}, {"MALLOC_TRIM_THRESHOLD_": "100000"}):
        done = subprocess.run(
            [sys.executable, "-c", _FAULTS], env={**os.environ, **chosen}, capture_output=True, text=True, timeout=60, check=True
        )
        results.append([int(word) for word in done.stdout.split()])
    (kept, _, again), (left, _, anew) = results
    assert (kept, left) == (1, 0) and again < pages // 10 < anew
