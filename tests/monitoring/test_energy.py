import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.monitoring.energy import ProcessorEnergy

RANGE = 262_143_328_850


def zone(folder: Path, place: str, name: str, microjoules: int, *, largest: int = RANGE) -> Path:
    path = folder / place
    path.mkdir(parents=True, exist_ok=True)
    for file, text in {"name": name, "energy_uj": str(microjoules), "max_energy_range_uj": str(largest)}.items():
        (path / file).write_text(text + "\n")
    return path / "energy_uj"


def test_energy_is_that_of_all_packages_and_of_memory_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    counters = {
        "intel-rapl:0": zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        "intel-rapl:1": zone(tmp_path, "intel-rapl:1", "package-1", 500),
        "intel-rapl:0:0": zone(tmp_path, "intel-rapl:0:0", "core", 100),
        "intel-rapl:0:1": zone(tmp_path, "intel-rapl:0:1", "dram", 100),
        "intel-rapl:2": zone(tmp_path, "intel-rapl:2", "psys", 100),
    }
    energy = ProcessorEnergy(tmp_path)
    assert energy.joules() == 0.0
    for place, joules in (("intel-rapl:0", 30), ("intel-rapl:1", 20), ("intel-rapl:0:0", 25), ("intel-rapl:0:1", 4), ("intel-rapl:2", 60)):
        counters[place].write_text(str(int(counters[place].read_text()) + joules * 1_000_000))
    assert energy.joules() == pytest.approx(54)


def test_a_package_that_is_shown_in_two_ways_is_counted_once(tmp_path: Path) -> None:
    register, mapped = (zone(tmp_path, f"{way}:0", "package-0", 0) for way in ("intel-rapl", "intel-rapl-mmio"))
    energy = ProcessorEnergy(tmp_path)
    for counter in (register, mapped):
        counter.write_text("7000000")
    assert energy.joules() == pytest.approx(7)
    register.unlink()
    energy = ProcessorEnergy(tmp_path)
    mapped.write_text("9000000")
    assert energy.joules() == pytest.approx(2), "what can be read is counted"


def test_the_dies_of_a_package_are_counted_each(tmp_path: Path) -> None:
    counters = [zone(tmp_path, f"intel-rapl:{die}", f"package-0-die-{die}", 0) for die in (0, 1)]
    (tmp_path / "intel-rapl").mkdir()  # the control type itself, which is no zone
    energy = ProcessorEnergy(tmp_path)
    for counter in counters:
        counter.write_text("5000000")
    assert energy.joules() == pytest.approx(10)


@contextmanager
def another_user() -> Iterator[None]:
    """Root reads every file, so the test becomes somebody else where it is root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_counters_that_only_root_may_read_give_no_figure_and_no_error() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        counter = zone(Path(name), "intel-rapl:0", "package-0", 5)
        counter.chmod(0o400 if os.geteuid() == 0 else 0)
        with another_user():
            assert (counter.parent / "name").read_text() == "package-0\n"
            with pytest.raises(PermissionError):
                counter.read_text()
            assert ProcessorEnergy(Path(name)).joules() is None


@settings(deadline=None, max_examples=50)
@given(start=st.integers(0, 1000), passed=st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_a_counter_that_wraps_around_loses_nothing(tmp_path_factory: pytest.TempPathFactory, start: int, passed: list[int]) -> None:
    folder = tmp_path_factory.mktemp("powercap")
    counter = zone(folder, "intel-rapl:0", "package-0", start, largest=1000)
    energy, total = ProcessorEnergy(folder), start
    for step in passed:
        total += step
        counter.write_text(str(total % 1001))
        energy.joules()
    assert energy.joules() == pytest.approx(sum(passed) / 1e6)


def test_without_a_readable_counter_there_is_no_figure(tmp_path: Path) -> None:
    assert ProcessorEnergy(tmp_path / "missing").joules() is None
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    counter.unlink()
    counter.mkdir()  # cannot be read, also not by root
    assert ProcessorEnergy(tmp_path).joules() is None


def test_a_counter_that_cannot_be_read_for_a_while_is_read_again(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    energy = ProcessorEnergy(tmp_path)
    counter.write_text("")
    assert energy.joules() == 0.0
    counter.write_text("3000000")
    assert energy.joules() == pytest.approx(3)
