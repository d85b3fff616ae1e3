"""The reader of a GPU with NVIDIA's own Python package, which calls a library that answers as the driver's header says.

The library is compiled here, because no GPU is at hand: it refuses a wrong device, sensor or clock, so wrong arguments are seen.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.packages import unpacked
from tests.support.sources import ROOT

pytestmark = pytest.mark.slow

UUID = "4d2e1f00-0000-4000-8000-000000000001"
BAD_ARGUMENT, NOT_FOUND = 2, 6
DRIVER = f"""
#include <string.h>
typedef unsigned long long big;
static int gpu;
#define OF_GPU(device) if ((device) != &gpu) return {BAD_ARGUMENT}
int nvmlInitWithFlags(unsigned flags) {{ return flags ? {BAD_ARGUMENT} : 0; }}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {{
  if (strcmp(uuid, "GPU-{UUID}")) return {NOT_FOUND};
  *device = &gpu; return 0; }}
int nvmlDeviceGetUtilizationRates(void *device, unsigned rates[2]) {{ OF_GPU(device); rates[0] = 93; rates[1] = 40; return 0; }}
int nvmlDeviceGetMemoryInfo(void *device, big info[3]) {{
  OF_GPU(device); info[0] = 80ull << 30; info[1] = 20ull << 30; info[2] = 60ull << 30; return 0; }}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {{ OF_GPU(device); *milliwatts = 300000; return 0; }}
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *megahertz) {{
  OF_GPU(device); if (kind != 1) return {BAD_ARGUMENT}; *megahertz = 1755; return 0; }}
#ifdef OLD
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *degrees) {{
  OF_GPU(device); if (sensor != 0) return {BAD_ARGUMENT}; *degrees = 71; return 0; }}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, big *reasons) {{ OF_GPU(device); *reasons = 0x44; return 0; }}
#else
struct temperature {{ unsigned version; int sensor; int degrees; }};
int nvmlDeviceGetTemperatureV(void *device, struct temperature *asked) {{
  OF_GPU(device); if (asked->version != (1u << 24 | sizeof *asked) || asked->sensor != 0) return {BAD_ARGUMENT};
  asked->degrees = 71; return 0; }}
int nvmlDeviceGetCurrentClocksEventReasons(void *device, big *reasons) {{ OF_GPU(device); *reasons = 0x44; return 0; }}
int nvmlDeviceGetTotalEnergyConsumption(void *device, big *millijoules) {{
  static big counted = 5000000; OF_GPU(device); *millijoules = counted += 42000; return 0; }}
#endif
"""
READ = """
import json, sys
from types import SimpleNamespace
import pynvml
from llamahome.monitoring.nvml import gpu_of
reader = gpu_of(SimpleNamespace(uuid=sys.argv[1]), pynvml)
print(json.dumps(None if reader is None else [reader.read(), reader.joules()]))
"""
FIGURES = {"util": 0.93, "memory": 0.75, "power": 300.0, "temperature": 71.0, "clock": 1755.0, "throttled": 1.0}


def read(folder: Path | None, uuid: str = UUID) -> Any:
    """What the reader says in a process of its own, with the library in `folder` as the driver's."""
    places = [str(ROOT / "src"), str(unpacked("nvidia-ml-py==13.615.71"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "LD_LIBRARY_PATH": str(folder) if folder else ""}
    done = subprocess.run([sys.executable, "-c", READ, uuid], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def driver(folder: Path, *options: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is here")
    (folder / "driver.c").write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", *options, "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "driver.c")]
    subprocess.run(command, check=True, timeout=60)
    return folder


def test_every_figure_is_asked_for_as_nvml_wants_it(tmp_path: Path) -> None:
    figures, joules = read(driver(tmp_path))
    assert figures == {f"system/gpu_{name}": value for name, value in FIGURES.items()}
    assert joules == pytest.approx(42), "the counter of the driver"


def test_an_older_driver_is_asked_under_the_older_names(tmp_path: Path) -> None:
    figures, joules = read(driver(tmp_path, "-DOLD"))
    assert figures == {f"system/gpu_{name}": value for name, value in FIGURES.items()}
    assert joules is None, "no counter, and one reading of the power is not enough"


def test_without_a_driver_or_with_another_gpu_there_is_quietly_nothing(tmp_path: Path) -> None:
    assert read(driver(tmp_path), "another") is None
    if not any(Path(folder).glob("libnvidia-ml.so*") for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")):
        assert read(None) is None
