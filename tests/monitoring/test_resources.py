import json
import math
import threading
import time
from pathlib import Path

import psutil
import pytest

from llamahome.distributed.control_groups import quota_periods
from llamahome.monitoring import resources
from llamahome.monitoring.counters import Rates
from llamahome.monitoring.resources import ResourceSampler, free_memory_bytes, memory_share_and_limit, process_memory, recent_memory

MIB = 2**20
ALWAYS = ("cpu", "cpus", "cpu_process", "ram", "ram_limit", "disk", "disk_free", "net_sent", "net_received")
SOMETIMES = ("disk_read", "disk_written", "cpu_power", "cpu_thermal", "cpu_throttled")
"""Where there is a disk of its own, readable counters, a quota."""


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
    always = {"t", "memory/rss", *(f"system/{name}" for name in ALWAYS)}
    assert always <= set(records[-1]) <= always | {"memory/swap", *(f"system/{name}" for name in SOMETIMES)}
    for record in records:
        assert all(0 <= record[name] <= 1 for name in ("system/cpu", "system/ram", "system/disk"))
        assert record["system/net_sent"] >= 0
        assert record["system/cpus"] > 0 and record["system/cpu_process"] >= 0
        assert 10 * MIB < record["memory/rss"] < record["system/ram_limit"]
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


def test_the_memory_of_a_line_is_read_at_most_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, reads = [5000.0], []
    monkeypatch.setattr(resources.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(resources, "process_memory", lambda: reads.append(seconds[0]) or (len(reads), 10 * len(reads)))
    monkeypatch.setattr(resources, "_recent", (-math.inf, 0, 0))
    found = []
    for passed in (0.0, 0.04, 0.05, 0.02, 3.0):
        seconds[0] += passed
        found.append(recent_memory())
    assert found == [(1, 10), (1, 10), (1, 10), (2, 20), (3, 30)]


def test_a_system_without_proc_is_asked_for_memory_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    direct = process_memory()
    monkeypatch.setattr(resources, "_own_status", lambda: b"")
    resident, peak = process_memory()
    assert abs(resident - direct[0]) < 64 * MIB and peak >= resident


def test_without_limits_the_free_memory_is_that_of_the_machine(tmp_path: Path) -> None:
    available = psutil.virtual_memory().available
    assert abs(free_memory_bytes(tmp_path) - available) < 0.2 * available + 512 * MIB
    assert 0 < memory_share_and_limit(tmp_path)[0] <= 1


@pytest.mark.parametrize("level", ["", "outer/", "outer/inner/"])
def test_a_cgroup_v2_limit_at_any_level_counts(tmp_path: Path, level: str) -> None:
    folder = f"sys/fs/cgroup/{level}"
    files = {
        "sys/fs/cgroup/outer/inner/memory.max": "max",
        "sys/fs/cgroup/outer/inner/memory.current": "5",
        "sys/fs/cgroup/outer/inner/memory.stat": "anon 5",
        folder + "memory.max": str(100 * MIB),
        folder + "memory.current": str(70 * MIB),
        folder + "memory.stat": f"anon 1\ninactive_file {15 * MIB}\nactive_file {5 * MIB}",
    }
    root = cgroup(tmp_path, "0::/outer/inner", files)
    assert free_memory_bytes(root) == 50 * MIB
    share, limit = memory_share_and_limit(root)
    assert share >= 0.5 and limit == 100 * MIB


def test_a_cgroup_v1_limit_counts_but_not_its_huge_default(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/job/"
    files = {
        folder + "memory.limit_in_bytes": str(64 * MIB),
        folder + "memory.usage_in_bytes": str(60 * MIB),
        folder + "memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}\ntotal_active_file {3 * MIB}",
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


def test_another_rank_measures_itself_only_and_says_who_it_is(tmp_path: Path) -> None:
    labels = {"rank": 3, "host": "node-1"}
    sampler = ResourceSampler(tmp_path / "system-rank-3.jsonl", every=3600, warn=pytest.fail, whole_machine=False, labels=labels)
    sampler.start()
    sampler.stop()
    (record,) = [json.loads(line) for line in (tmp_path / "system-rank-3.jsonl").read_text().splitlines()]
    assert (record["rank"], record["host"]) == (3, "node-1")
    assert set(record) - {"memory/swap"} == {"t", "rank", "host", "memory/rss", "system/cpu_process"}
    assert sampler.joules() is None


def test_a_run_on_a_machine_with_counters_knows_its_energy_and_power(tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in {"name": "package-0", "max_energy_range_uj": "262143328850", "energy_uj": "5000000"}.items():
        (zone / name).write_text(text)
    sampler = ResourceSampler(tmp_path / "system.jsonl", every=3600, warn=pytest.fail, root=tmp_path)
    sampler.start()
    (zone / "energy_uj").write_text("12000000")
    sampler.stop()
    assert sampler.joules() == pytest.approx(7.0)
    assert sampler.latest()["system/cpu_power"] > 0


def test_a_group_whose_quota_is_used_up_is_measured_at_the_level_where_it_is_worst(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/a/cpu.stat": "nr_periods 100\nnr_throttled 10", "sys/fs/cgroup/a/b/cpu.stat": "nr_periods 100\nnr_throttled 0"}
    times = iter([0.0, 1.0, 2.0])
    rates = Rates(cgroup(tmp_path, "0::/a/b", files), now=lambda: next(times))
    rates.read()
    cgroup(
        tmp_path, "0::/a/b", {"sys/fs/cgroup/a/cpu.stat": "nr_periods 120\nnr_throttled 15", "sys/fs/cgroup/a/b/cpu.stat": "nr_periods 120"}
    )
    assert rates.read()["system/cpu_throttled"] == pytest.approx(0.25)


def test_a_quota_of_version_1_is_measured_and_no_quota_gives_no_figure(tmp_path: Path) -> None:
    root = cgroup(
        tmp_path, "3:cpu,cpuacct:/job", {"sys/fs/cgroup/cpu,cpuacct/job/cpu.stat": "nr_periods 10\nnr_throttled 4\nthrottled_time 9"}
    )
    assert [*quota_periods(root).values()] == [(10, 4)]
    assert quota_periods(cgroup(tmp_path / "none", "0::/", {"sys/fs/cgroup/cpu.stat": "usage_usec 5"})) == {}


def test_a_processor_that_is_hot_is_counted_once_per_package(tmp_path: Path) -> None:
    for cpu, package in ((0, 0), (1, 0), (2, 1)):
        cgroup(
            tmp_path,
            "0::/",
            {
                f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id": str(package),
                f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/package_throttle_count": "5",
            },
        )
    times = iter([10.0, 12.0, 14.0])
    rates = Rates(tmp_path, now=lambda: next(times))
    rates.read()
    for cpu in (0, 1):
        (tmp_path / f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/package_throttle_count").write_text("11\n")
    assert rates.read()["system/cpu_thermal"] == pytest.approx(3.0)
