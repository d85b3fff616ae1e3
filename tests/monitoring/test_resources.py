import json
import threading
import time
from pathlib import Path

import psutil
import pytest

from llamahome.monitoring.resources import ResourceSampler, free_memory_bytes, process_memory, used_memory_share

MIB = 2**20


def cgroup(root: Path, line: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": line, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_samples_are_shares_and_rates_under_the_documented_names(tmp_path: Path) -> None:
    sampler = ResourceSampler(tmp_path / "run" / "system.jsonl", every=0.02, warn=pytest.fail, disk=tmp_path)
    assert sampler.latest() == {}
    sampler.start()
    time.sleep(0.15)
    sampler.stop()
    records = [json.loads(line) for line in (tmp_path / "run" / "system.jsonl").read_text().splitlines()]
    assert len(records) >= 2
    assert {"t", "system/cpu", "system/ram", "system/disk", "system/net_sent", "system/net_received", "memory/rss"} == set(records[-1])
    for record in records:
        assert all(0 <= record[name] <= 1 for name in ("system/cpu", "system/ram", "system/disk"))
        assert record["system/net_sent"] >= 0
    assert sampler.latest()["memory/rss"] == records[-1]["memory/rss"]


def test_stop_takes_a_last_sample_at_once_and_ends_the_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    sampler = ResourceSampler(tmp_path / "system.jsonl", every=3600, warn=pytest.fail)
    sampler.start()
    started = time.monotonic()
    sampler.stop()
    assert time.monotonic() - started < 60
    assert threading.active_count() == before
    assert len((tmp_path / "system.jsonl").read_text().splitlines()) == 1
    sampler.stop()


def test_the_memory_of_this_process_is_plausible() -> None:
    resident, peak = process_memory()
    assert resident > 10 * MIB
    assert peak >= resident


def test_without_limits_the_free_memory_is_that_of_the_machine(tmp_path: Path) -> None:
    available = psutil.virtual_memory().available
    assert abs(free_memory_bytes(tmp_path) - available) < 0.2 * available + 512 * MIB
    assert 0 < used_memory_share(tmp_path) <= 1


@pytest.mark.parametrize("level", ["", "outer/", "outer/inner/"])
def test_a_cgroup_v2_limit_at_any_level_counts(tmp_path: Path, level: str) -> None:
    folder = f"sys/fs/cgroup/{level}"
    files = {
        "sys/fs/cgroup/outer/inner/memory.max": "max",
        "sys/fs/cgroup/outer/inner/memory.current": "5",
        "sys/fs/cgroup/outer/inner/memory.stat": "anon 5",
        folder + "memory.max": str(100 * MIB),
        folder + "memory.current": str(70 * MIB),
        folder + "memory.stat": f"anon 1\ninactive_file {20 * MIB}",
    }
    root = cgroup(tmp_path, "0::/outer/inner", files)
    assert free_memory_bytes(root) == 50 * MIB
    assert used_memory_share(root) >= 0.5


def test_a_cgroup_v1_limit_counts_but_not_its_huge_default(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/job/"
    files = {
        folder + "memory.limit_in_bytes": str(64 * MIB),
        folder + "memory.usage_in_bytes": str(60 * MIB),
        folder + "memory.stat": f"inactive_file 1\ntotal_inactive_file {4 * MIB}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0",
        "sys/fs/cgroup/memory/memory.stat": "cache 0",
    }
    assert free_memory_bytes(cgroup(tmp_path, "4:memory:/job\n0::/", files)) == 8 * MIB


def test_inside_a_container_only_the_top_level_is_visible(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory.max": str(10 * MIB),
        "sys/fs/cgroup/memory.current": str(12 * MIB),
        "sys/fs/cgroup/memory.stat": "inactive_file 0",
    }
    assert free_memory_bytes(cgroup(tmp_path, "0::/docker/not-visible-here", files)) == 0
