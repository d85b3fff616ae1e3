"""The reader of a GPU asks NVML's own functions; a stand-in for the library answers in NVML's units."""

from types import SimpleNamespace
from typing import Any

import pytest

from llamahome.monitoring.nvml import GpuReader, gpu_of

MIB = 2**20


class NVMLError(Exception):
    pass


class Library:
    """Answers like pynvml on an 80 GB card; functions named in `missing` raise as an old card does."""

    NVMLError = NVMLError

    def __init__(self, *missing: str, reasons: int = 0x4) -> None:
        self.missing, self.reasons, self.millijoules, self.milliwatts = missing, reasons, 5_000_000, 300_000
        self.initialized = False

    def nvmlInit(self) -> None:
        self.initialized = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if not self.initialized or uuid != "GPU-4d2e":
            raise NVMLError("Not Found")
        return "handle"

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetUtilizationRates": lambda: SimpleNamespace(gpu=93, memory=40),
            "nvmlDeviceGetMemoryInfo": lambda: SimpleNamespace(used=60 * MIB, total=80 * MIB, free=20 * MIB),
            "nvmlDeviceGetPowerUsage": lambda: self.milliwatts,
            "nvmlDeviceGetTemperature": lambda sensor: {0: 71}[sensor],
            "nvmlDeviceGetClockInfo": lambda kind: {0: 300, 1: 1755}[kind],
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda: self.reasons,
            "nvmlDeviceGetTotalEnergyConsumption": lambda: self.millijoules,
        }
        if name not in answers:
            raise AttributeError(name)

        def ask(handle: str, *arguments: int) -> Any:
            if handle != "handle" or name in self.missing:
                raise NVMLError("Not Supported")
            return answers[name](*arguments)

        return ask


def test_figures_have_the_documented_units() -> None:
    assert GpuReader(Library(), "handle").read() == {
        "system/gpu_util": 0.93,
        "system/gpu_memory": 0.75,
        "system/gpu_power": 300.0,
        "system/gpu_temperature": 71.0,
        "system/gpu_clock": 1755.0,
        "system/gpu_throttled": 0.0,
    }


@pytest.mark.parametrize(("reasons", "slowed"), [(0x0, 0), (0x1, 0), (0x4, 0), (0x8, 1), (0x20, 1), (0x44, 1), (0x80, 1)])
def test_heat_and_power_brakes_count_as_throttled_but_idling_and_the_power_cap_do_not(reasons: int, slowed: float) -> None:
    assert GpuReader(Library(reasons=reasons), "handle").read()["system/gpu_throttled"] == slowed


def test_what_a_card_does_not_give_is_left_out() -> None:
    library = Library("nvmlDeviceGetClockInfo", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption")
    reader = GpuReader(library, "handle")
    assert set(reader.read()) == {f"system/gpu_{name}" for name in ("util", "memory", "temperature", "throttled")}
    assert reader.joules() is None


def test_energy_is_the_difference_of_the_counter() -> None:
    library = Library()
    reader = GpuReader(library, "handle")
    library.millijoules += 42_000
    reader.read()
    assert reader.joules() == pytest.approx(42)


def test_without_a_counter_energy_is_power_times_time() -> None:
    library, times = Library("nvmlDeviceGetTotalEnergyConsumption"), iter([0.0, 2.0, 4.0])
    reader = GpuReader(library, "handle", now=lambda: next(times))
    reader.read()
    assert reader.joules() is None
    library.milliwatts = 100_000
    reader.read()
    reader.read()
    assert reader.joules() == pytest.approx(2 * 200 + 2 * 100)


def test_a_gpu_is_found_by_its_uuid_and_an_unknown_one_is_left_out() -> None:
    assert gpu_of(SimpleNamespace(uuid="4d2e"), Library()) is not None
    assert gpu_of(SimpleNamespace(uuid="other"), Library()) is None
    assert gpu_of(SimpleNamespace(), Library()) is None
