"""What doctor says to facts that this machine does not have: GPUs, drivers, clocks, disks, links, steps."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llamahome.doctor.checks import Check, Request, failed, passed, summary, warned
from llamahome.doctor.drivers import Driver, Gpu, TorchBuild, driver_check, gpu_checks, runs_on
from llamahome.doctor.links import Link
from llamahome.doctor.machine import Machine, clock_check, limit_checks, memory_checks, processor_check, read_machine
from llamahome.doctor.nodes import Meeting, Place, link_check, node_checks
from llamahome.doctor.pair import PairResult, pair_check
from llamahome.doctor.steps import StepTimes, time_checks
from llamahome.doctor.storage import PURPOSES, DiskRate, Folder, copy_check, disk_check, folder_check
from llamahome.doctor.versions import is_within

GIB = 2**30
PIP = ("python", "-m", "pip", "install")
H100 = Gpu("H100", (9, 0), 80 * GIB, 79 * GIB)
BUILD = TorchBuild("2.13.0+cu130", "13.0", None, ("sm_80", "sm_90", "compute_90"), (H100,), None)
DRIVER = Driver(1, "580.82.07", (H100,))

numbers = st.integers(0, 30)
versions = st.builds(
    lambda parts, end: ".".join(map(str, parts)) + end,
    st.lists(numbers, min_size=1, max_size=4),
    st.sampled_from(["", "", "", "rc1", "a2", ".dev3", "+cu130"]),
)
bounds = st.lists(numbers, min_size=2, max_size=3).map(lambda parts: ".".join(map(str, parts)))
clauses = st.builds(str.__add__, st.sampled_from([">=", "<=", "<", ">", "==", "!=", "~="]), bounds)


@given(versions, st.lists(clauses, min_size=1, max_size=3).map(",".join))
def test_ranges_of_versions_mean_what_they_mean_to_pip(version: str, ranges: str) -> None:
    strict_bound = any(each[0] in "<>" and each[1] != "=" for each in ranges.split(",")) and "+" in version
    if not strict_bound:  # PEP 440 excludes a local version of the bound itself from `>`; none of our ranges has that
        assert is_within(version, ranges) == SpecifierSet(ranges, prereleases=True).contains(Version(version))


@pytest.mark.parametrize(
    ("driver", "build", "status", "detail", "help"),
    [
        (DRIVER, BUILD, "PASS", "driver 580.82.07 for torch 2.13.0+cu130", None),
        (replace(DRIVER, version="535.104.05"), BUILD, "FAIL", "too old for torch", "nvidia-driver-580"),
        (replace(DRIVER, version="535.104.05"), replace(BUILD, cuda="12.6"), "PASS", "CUDA 12.6", None),
        (DRIVER, replace(BUILD, version="2.13.0+cpu", cuda=None, devices=()), "FAIL", "is built without CUDA", "/cu130"),
        (Driver(0, None, ()), replace(BUILD, devices=()), "WARN", "there is no NVIDIA driver", "/cpu"),
        (Driver(2, None, ()), replace(BUILD, devices=()), "FAIL", "2 NVIDIA GPUs, but no driver", None),
        (DRIVER, replace(BUILD, devices=(), hidden=True), "WARN", "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"),
        (DRIVER, replace(BUILD, devices=(), trouble="CUDA unknown error"), "FAIL", "CUDA unknown error", None),
        (DRIVER, None, "WARN", "torch cannot be asked", None),
        (Driver(0, None, ()), replace(BUILD, cuda=None, devices=(), other="mps"), "PASS", "mps", None),
    ],
)
def test_driver_and_build_of_torch(driver: Driver, build: TorchBuild | None, status: str, detail: str, help: str | None) -> None:
    check = driver_check(driver, build, PIP)
    assert (check.name, check.status) == ("gpu-driver", status) and detail in check.detail, check
    assert help is None or check.help is None or help in check.help


def test_a_gpu_that_torch_is_not_built_for_and_one_that_others_fill_are_named() -> None:
    old = replace(H100, name="Tesla P4", capability=(6, 1))
    full = replace(H100, free=10 * GIB)
    found = list(gpu_checks(replace(BUILD, architectures=("sm_80", "sm_90"), devices=(H100, old, full))))
    assert [check.status for check in found] == ["PASS", "FAIL", "WARN"] and "capability 6.1" in found[1].detail


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [((8, 6), ("sm_80",), True), ((8, 0), ("sm_86",), False), ((12, 0), ("sm_90", "compute_90"), True), ((12, 0), ("sm_90a",), False)],
)
def test_code_runs_on_the_same_major_version_or_is_compiled_from_an_older_one(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    assert runs_on(capability, architectures) == runs


@pytest.fixture
def machine() -> Machine:
    quiet = {"swapped": 0, "memory": 16 * GIB, "free_memory": 12 * GIB, "memory_limit": None, "free_below_limit": None, "quota": None}
    return replace(
        read_machine(), **quiet, open_files=4096, most_open_files=4096, newest_file=None, now=1.8e9, file_size=-1, address_space=-1
    )


def test_a_machine_without_faults_passes(machine: Machine) -> None:
    checks = [processor_check(machine), *memory_checks(machine), *limit_checks(machine), clock_check(machine)]
    assert {check.status for check in checks} == {"PASS"}, checks


def test_a_clock_before_the_release_fails_and_one_long_after_it_warns(machine: Machine) -> None:
    check = clock_check(replace(machine, now=0.0))
    assert check.status == "FAIL" and "1970-01-01" in check.detail
    assert clock_check(replace(machine, now=4e9)).status == "WARN"


def test_little_memory_warns_and_too_little_fails(machine: Machine) -> None:
    statuses = [next(memory_checks(replace(machine, free_memory=free))).status for free in (GIB // 2, 3 * GIB // 2, 3 * GIB)]
    assert statuses == ["FAIL", "WARN", "PASS"]


def test_without_the_right_to_raise_a_limit_no_help_is_given(machine: Machine) -> None:
    check = next(limit_checks(replace(machine, open_files=200, most_open_files=200)))
    assert (check.status, check.help) == ("WARN", None)


def test_slow_disks_and_memory_warn() -> None:
    assert disk_check("disk", DiskRate("x", 5e6, 1e9)).status == "WARN"
    assert disk_check("disk", DiskRate("x", 5e8, 1e9)).status == copy_check(5e9).status == "PASS"
    assert copy_check(1e8).status == "WARN"


def test_no_inodes_little_room_and_no_room_are_told_apart() -> None:
    folder = Folder("output", "output", True, "", 9 * GIB, 1000)
    purpose = PURPOSES["output"]
    full = folder_check(purpose, replace(folder, free=0), roomy="/my disk")
    assert (full.status, full.help) == ("FAIL", "export LLAMAHOME_OUTPUT__DIR='/my disk'/run")
    assert folder_check(purpose, replace(folder, free_files=0), roomy=None) == failed(
        "output-folder", f"the disk of output has no room for one more file (no inodes); {purpose.consequence}"
    )
    assert folder_check(purpose, replace(folder, free=GIB), roomy=None).status == "WARN"
    assert folder_check(purpose, folder, roomy=None).status == "PASS"


PLACE = Place("10.0.0.1", 29500, 0, 2, 3, 45)
LINK = Link(1, "b", "0.1.0", 1e-4, 9e8, 9e8, True)


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [
        ({}, "PASS", "ms there and back"),
        ({"version": "0.0.9"}, "FAIL", "it has llamahome 0.0.9"),
        ({"open_ports": False}, "FAIL", "does not reach another port"),
        ({"received": 1e7}, "WARN", "gradients take long"),
        ({"latency_s": 0.05}, "WARN", "every step waits"),
    ],
)
def test_a_link_is_judged_by_version_ports_rate_and_latency(change: dict, status: str, detail: str) -> None:
    check = link_check(replace(LINK, **change))
    assert check.status == status and detail in check.detail, check


def test_who_is_missing_is_named_and_may_be_missing_if_the_run_can_do_without() -> None:
    needed, *_ = node_checks(replace(PLACE, least=3), Meeting(links=(LINK,)))
    assert needed.status == "FAIL" and "2 of 3 machines met" in needed.detail and "missing: machine 2" in needed.detail
    assert needed.help == "llamahome doctor --num-nodes 3 --node-rank 2 --master-addr 10.0.0.1"
    spare, *_ = node_checks(PLACE, Meeting(links=(LINK,)))
    assert spare.status == "WARN"
    twice, *_ = node_checks(PLACE, Meeting(links=(LINK,), twice=(1,)))
    assert twice.status == "FAIL" and "more than one machine calls itself machine 1" in twice.detail


def test_a_name_that_is_loopback_here_is_refused_with_the_address_that_others_reach() -> None:
    check, *_ = node_checks(replace(PLACE, address="host0"), Meeting("loopback", "127.0.1.1", own_address="10.0.0.1"))
    assert check.status == "FAIL" and "/etc/hosts" in check.detail and check.help.endswith("--node-rank 0 --master-addr 10.0.0.1")


TIMES = StepTimes(
    source="chats.jsonl",
    rows=2,
    tokens=400,
    batch_size=32,
    seconds=(2.0, 1.0),
    parts={"data": 0.01, "forward": 0.4, "backward": 0.5, "update": 0.09},
    losses=(2.5, 2.4),
    grad_norms=(1.0, 0.9),
    reduced=True,
    peak=GIB,
    free=8 * GIB,
    prepared_s=2.0,
    saved_s=0.1,
)


def test_two_steps_tell_where_their_time_goes_and_how_long_a_whole_step_takes() -> None:
    steps, data, memory = time_checks(TIMES)
    assert {steps.status, data.status, memory.status} == {"PASS"}
    assert "forward 40%, backward 50%, update 9%" in steps.detail and "a step of 32 rows takes about 0:16" in steps.detail


@pytest.mark.parametrize(
    ("change", "name", "status", "help"),
    [
        ({"losses": (2.5, float("nan"))}, "two-steps", "FAIL", "export LLAMAHOME_TRAINING__MIXED_PRECISION=false"),
        ({"grad_norms": (float("inf"), 1.0), "reduced": False}, "two-steps", "FAIL", None),
        ({"parts": {"data": 0.5, "forward": 0.5}}, "data-loading", "WARN", "export LLAMAHOME_DATA__STREAMING=false"),
        ({"free": GIB // 10}, "step-memory", "WARN", "export LLAMAHOME_TRAINING__MICRO_BATCH_TOKENS=512"),
        ({"ran_out": "no more memory"}, "two-steps", "FAIL", "export LLAMAHOME_TRAINING__MICRO_BATCH_TOKENS=512"),
    ],
)
def test_steps_that_are_wrong_or_wait_are_named(change: dict, name: str, status: str, help: str | None) -> None:
    check = next(each for each in time_checks(replace(TIMES, **change)) if each.name == name)
    assert check.status == status and (check.help is None if help is None else check.help.startswith(help)), check


def test_a_wrong_sum_fails() -> None:
    assert pair_check(PairResult("gloo", False, 1e9, None)).status == "FAIL"
    assert pair_check(PairResult("gloo", True, 1e9, None)).status == "PASS"
    assert pair_check(PairResult("gloo", False, 0.0, "refused")) == failed("two-processes", "gloo: refused")


def test_the_summary_counts_and_a_request_survives_its_way_to_another_process() -> None:
    checks: list[Check] = [passed("a", ""), passed("b", ""), warned("c", ""), failed("d", "")]
    assert summary(checks) == "2 passed, 1 warning, 1 failed" and summary(checks[:2]) == "2 passed, 0 warnings, 0 failed"
    request = Request(data=("a b",), flags={"training.epochs": ("--epochs", 3.0)}, environment={"RANK": "0"})
    assert Request.from_json(asdict(request)) == request
