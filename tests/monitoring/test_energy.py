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
