"""Reads one NVIDIA GPU through NVML (the package nvidia-ml-py, extra `gpu`): use, memory, power, heat, clock, throttling, energy.

A figure that the GPU or its driver does not give is left out. NVML numbers all GPUs of a machine and torch only the visible ones, so the
GPU is found by its UUID.
"""

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

_SLOWED = 0x08 | 0x20 | 0x40 | 0x80
"""Reasons for a lower clock that are a trouble: hardware slowdown, heat by software and by hardware, power brake. The power cap (0x04) is
not among them, because a busy GPU reaches it."""


class GpuReader:
    """Reads the GPU `handle` with `library`, which is pynvml."""

    def __init__(self, library: Any, handle: Any, *, now: Callable[[], float] = time.monotonic) -> None:
        self._library, self._handle, self._now = library, handle, now
        self._first_mj: float | None = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        self._joules: float | None = None
        self._last_power: tuple[float, float] | None = None
        """(time, watts)."""

    def read(self) -> dict[str, float]:
        """The metrics that can be read now."""
        found: dict[str, float | None] = {
            "system/gpu_util": self._ask("nvmlDeviceGetUtilizationRates", of=lambda rates: rates.gpu / 100),
            "system/gpu_memory": self._ask("nvmlDeviceGetMemoryInfo", of=lambda memory: memory.used / memory.total),
            "system/gpu_power": self._ask("nvmlDeviceGetPowerUsage", of=lambda milliwatts: milliwatts / 1000),
            "system/gpu_temperature": self._ask_newer("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", 0),
            "system/gpu_clock": self._ask("nvmlDeviceGetClockInfo", 1),
            "system/gpu_throttled": self._slowed(),
        }
        self._count_energy(found["system/gpu_power"])
        return {name: float(value) for name, value in found.items() if value is not None}

    def joules(self) -> float | None:
        """Energy since this object was made: by the GPU's counter, or by its power from one `read` to the next; None without both."""
        return self._joules

    def _count_energy(self, watts: float | None) -> None:
        counted, now = self._ask("nvmlDeviceGetTotalEnergyConsumption"), self._now()
        if counted is not None and self._first_mj is not None:
            self._joules = (counted - self._first_mj) / 1000
        elif watts is not None:
            if self._last_power is not None:
                then, before = self._last_power
                self._joules = (self._joules or 0.0) + (now - then) * (watts + before) / 2
            self._last_power = now, watts

    def _slowed(self) -> float | None:
        reasons = self._ask_newer("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if reasons is None else bool(int(reasons) & _SLOWED)

    def _ask_newer(self, newer: str, older: str, *arguments: int) -> float | None:
        """The answer of a function that NVML has renamed: an old driver has only the older name, a later one will have only the newer."""
        found = self._ask(newer, *arguments)
        return self._ask(older, *arguments) if found is None else found

    def _ask(self, function: str, *arguments: int, of: Callable[[Any], float] = float) -> float | None:
        try:
            return of(getattr(self._library, function)(self._handle, *arguments))
        except (self._library.NVMLError, AttributeError, ZeroDivisionError):  # not supported by this GPU, driver or version
            return None


def open_gpu() -> GpuReader | None:
    """The GPU on which this process computes; None without one, without NVML, or without nvidia-ml-py."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return None
    module: Any = torch.get_device_module(torch.accelerator.current_accelerator())
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    return gpu_of(module.get_device_properties(torch.accelerator.current_device_index()), library)


def gpu_of(properties: Any, library: Any) -> GpuReader | None:
    """The reader of the device with these `properties` of torch; None if NVML does not know it."""
    uuid = getattr(properties, "uuid", None)
    if uuid is None:
        return None
    try:
        library.nvmlInit()
        return GpuReader(library, library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except library.NVMLError:
        return None
