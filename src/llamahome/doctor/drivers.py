"""Checks the NVIDIA driver and GPUs against the build of torch.

The facts come from /proc, /sys and nvidia-smi (standard library only), and from torch if it can be imported. CUDA is initialised only in
`read_torch`, which can hang on a broken driver, so it runs in a process of its own with a time limit.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamahome.doctor.checks import Check, failed, one_line, passed, warned
from llamahome.doctor.versions import parse_version
from llamahome.units import show_bytes

_NVIDIA = "0x10de"
_QUERY = "name,driver_version,compute_cap,memory.total,memory.free"
_SECONDS = 10
_VERSION = re.compile(r"\d+(?:\.\d+)+")
_TABLE = re.compile(r"Driver Version:\s*([\d.]+)")
_OLDEST_DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
"""The oldest driver for each major version of CUDA on Linux (CUDA Compatibility, NVIDIA, table of minor version compatibility)."""
_TIGHT = 0.5
"""Share of a GPU's memory below which other programs are in the way."""
_INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi lists it."""

    name: str
    capability: tuple[int, int] | None
    """9.0 of an H100."""
    memory: int
    """Bytes; 0 if unknown."""
    free: int


@dataclass(frozen=True)
class Driver:
    """What the machine says without torch."""

    cards: int
    """NVIDIA display controllers on the PCI bus."""
    version: str | None
    """Of the kernel driver; None without one."""
    gpus: tuple[Gpu, ...]
    trouble: str | None = None
    """What nvidia-smi said when it failed."""


@dataclass(frozen=True)
class TorchBuild:
    """What torch is built for, and what it finds."""

    version: str
    cuda: str | None
    """Version of CUDA; None for a build without it."""
    other: str | None
    """Another accelerator that torch finds, such as mps."""
    architectures: tuple[str, ...]
    """sm_90, compute_90, ..."""
    devices: tuple[Gpu, ...]
    trouble: str | None
    """Why torch finds no GPU; None if it finds one or is built without CUDA."""
    hidden: bool = False
    """Whether CUDA_VISIBLE_DEVICES is set and leaves none."""


def read_driver(root: Path = Path("/")) -> Driver:
    """Look for a driver and GPUs; `root` is the folder that contains proc and sys."""
    version, trouble = _kernel_driver(root), None
    gpus: list[Gpu] = []
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            trouble = one_line(f"nvidia-smi: {error}")
        else:
            rows = [[word.strip() for word in line.split(",")] for line in result.stdout.splitlines()]
            gpus = [_gpu(row) for row in rows if len(row) > 1 and _VERSION.fullmatch(row[1])]
            table = _TABLE.search(result.stdout)  # of a program that does not know the query
            version = version or next((row[1] for row in rows if len(row) > 1 and _VERSION.fullmatch(row[1])), table and table[1])
            if result.returncode != 0 or not (gpus or table):
                trouble = one_line(f"nvidia-smi: {result.stdout or result.stderr or f'exit status {result.returncode}'}", most=160)
    return Driver(_cards(root), version, tuple(gpus), trouble)


def _gpu(row: list[str]) -> Gpu:
    name, _, capability, total, free, *_ = [*row, "", "", ""]
    major, _, minor = capability.partition(".")
    sizes = [int(word) * 2**20 if word.isdigit() else 0 for word in (total, free)]
    return Gpu(name, (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None, *sizes)


def _kernel_driver(root: Path) -> str | None:
    """The version in /proc/driver/nvidia/version: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat ...`."""
    try:
        words = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def _cards(root: Path) -> int:
    """NVIDIA devices of PCI class 3, display controller."""
    count = 0
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor = (folder / "vendor").read_text(encoding="ascii").strip()
            count += vendor == _NVIDIA and (folder / "class").read_text(encoding="ascii").startswith("0x03")
        except OSError:
            continue
    return count


def read_torch() -> TorchBuild:
    """Import torch and ask it. ImportError or OSError if that fails."""
    import os

    import torch

    cuda = torch.version.cuda
    devices: list[Gpu] = []
    trouble = None
    if cuda is not None:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            for number in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(number)
                devices.append(Gpu(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number), total, free))
        except (RuntimeError, AssertionError) as error:
            trouble = one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, most=160)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    other = found.type if found is not None and found.type != "cuda" else None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    return TorchBuild(torch.__version__, cuda, other, tuple(torch.cuda.get_arch_list()), tuple(devices), trouble, hidden)


def driver_check(driver: Driver, build: TorchBuild | None, pip: tuple[str, ...]) -> Check:
    """Whether torch's build and the driver fit each other; `build` is None if torch cannot be imported."""
    cards = max(driver.cards, len(driver.gpus)) or (1 if driver.version is not None else 0)
    present = f"{cards} NVIDIA GPU{'' if cards == 1 else 's'}"
    if driver.version is None:
        return _without_driver(driver, build, present, pip)
    if driver.trouble is not None and not driver.gpus:
        return failed("gpu-driver", f"driver {driver.version} does not answer: {driver.trouble}", _restart())
    if build is None:
        return warned("gpu-driver", f"{present}, driver {driver.version}; torch cannot be asked")
    if build.cuda is None and build.other is None:
        text = f"{present} with driver {driver.version}, but torch {build.version} is built without CUDA: only the processor is used"
        newest = max((each for each, oldest in _OLDEST_DRIVERS.items() if _numbers(driver.version) >= oldest), default=None)
        index = {12: f"{_INDEX}/cu126", 13: f"{_INDEX}/cu130"}.get(newest or 0)
        return failed("gpu-driver", text, _reinstall(pip, index) if index else None)
    if build.cuda is None:
        return passed("gpu-driver", f"torch {build.version} uses {build.other}")
    oldest = _OLDEST_DRIVERS.get(int(build.cuda.split(".")[0]))
    if oldest is not None and _numbers(driver.version) < oldest:
        wanted = ".".join(str(part) for part in oldest)
        text = f"driver {driver.version} is too old for torch {build.version}, which is built for CUDA {build.cuda}: it needs {wanted}"
        return failed("gpu-driver", text, f"sudo apt-get install nvidia-driver-{oldest[0]}" if shutil.which("apt-get") else None)
    if build.hidden:
        text = f"{present}, driver {driver.version}, hidden by CUDA_VISIBLE_DEVICES: the processor is used"
        return warned("gpu-driver", text, "unset CUDA_VISIBLE_DEVICES")
    if not build.devices:
        return failed("gpu-driver", f"{present}, driver {driver.version}, but torch finds none: {build.trouble or 'no reason given'}")
    return passed("gpu-driver", f"driver {driver.version} for torch {build.version}, CUDA {build.cuda}")


def _without_driver(driver: Driver, build: TorchBuild | None, present: str, pip: tuple[str, ...]) -> Check:
    if driver.cards:
        help_ = "sudo apt-get install nvidia-driver-580" if shutil.which("apt-get") else None
        return failed("gpu-driver", f"{present}, but no driver: only the processor is used", help_)
    if driver.trouble is not None:
        return failed("gpu-driver", f"the driver does not answer: {driver.trouble}", _restart())
    if build is not None and build.cuda is not None and not build.devices:
        text = f"torch {build.version} is built for CUDA {build.cuda}, and there is no NVIDIA driver: the processor is used"
        return warned("gpu-driver", f"{text} (in a container, start it with --gpus all)", _reinstall(pip, f"{_INDEX}/cpu"))
    if build is not None and build.other is not None:
        return passed("gpu-driver", f"torch {build.version} uses {build.other}")
    return passed("gpu-driver", "no NVIDIA GPU, and a torch for the processor" if build is not None else "no NVIDIA GPU")


def gpu_checks(build: TorchBuild) -> Iterator[Check]:
    """Whether each GPU that torch finds is of an architecture that it is built for, and has free memory."""
    for number, gpu in enumerate(build.devices):
        name, capability = f"gpu-{number}", gpu.capability
        shown = f"{gpu.name}, {show_bytes(gpu.free)} of {show_bytes(gpu.memory)} free"
        if capability is not None and not runs_on(capability, build.architectures):
            built = " ".join(build.architectures)
            yield failed(name, f"{shown}: capability {capability[0]}.{capability[1]}, and torch {build.version} is built for {built}")
        elif gpu.free < _TIGHT * gpu.memory:
            yield warned(name, f"{shown}: other programs use the rest", "nvidia-smi" if shutil.which("nvidia-smi") else None)
        else:
            yield passed(name, f"{shown}, capability {capability[0]}.{capability[1]}" if capability else shown)


def runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether code for one of the architectures runs on a GPU: sm_ of the same major version, or compute_ of any older one."""
    for each in architectures:
        kind, _, digits = each.partition("_")
        number = "".join(letter for letter in digits if letter.isdigit())
        if not number:
            continue
        major, minor = int(number[:-1]), int(number[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return not architectures


def _numbers(version: str) -> tuple[int, ...]:
    try:
        return parse_version(version)[0]
    except ValueError:
        return ()


def _reinstall(pip: tuple[str, ...], index: str) -> str | None:
    """Install another build of torch; pip keeps the present one without --force-reinstall."""
    return shlex.join([*pip, "--force-reinstall", "--no-deps", "torch", "--index-url", index]) if pip else None


def _restart() -> str | None:
    """A driver that was updated while it is loaded answers only after a restart."""
    return "sudo reboot" if sys.platform == "linux" else None
