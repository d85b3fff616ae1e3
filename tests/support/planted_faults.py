"""Faults of a machine, its settings and files that a test plants for real, with what doctor says to each."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.models import save_tiny

GIB = 2**30


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def machine(folder: Path, **files: str) -> tuple[str, ...]:
    """The option that shows doctor another machine: 16 GiB, 12 GiB of them free, and these files (`__` stands for a slash)."""
    root = folder / "machine"
    write(root / "proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {12 * GIB // 1024} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n")
    for name, text in files.items():
        write(root / name.replace("__", "/"), text)
    return ("--machine-root", str(root))


@dataclass(frozen=True)
class Fault:
    """What is planted, and what doctor says to it."""

    group: str
    name: str
    status: str
    detail: str
    """A part of it."""
    help: str | None = None
    before: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    plant: Callable[[Path], tuple[str, ...] | None] = lambda folder: None
    """May return further words."""
    mends: bool = True
    """Whether the help line is typed to see it mend."""


def _settings(text: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        write(folder / ".config/training_config.yaml", text)

    return plant


def _future(folder: Path) -> None:
    os.utime(write(folder / "data/training/raw/rows.jsonl", "{}\n"), (4e9, 4e9))


def _v2_memory(folder: Path) -> tuple[str, ...]:
    group = {"memory.max": str(3 * GIB), "memory.current": str(GIB), "memory.stat": "inactive_file 0\n"}
    return machine(folder, proc__self__cgroup="0::/pod\n", **{f"sys__fs__cgroup__pod__{name}": text for name, text in group.items()})


def _v1_memory(folder: Path) -> tuple[str, ...]:
    group = {"limit_in_bytes": str(GIB), "usage_in_bytes": str(GIB // 2)}
    files = {f"sys__fs__cgroup__memory__job__memory.{name}": text for name, text in group.items()}
    return machine(
        folder, proc__self__cgroup="5:memory:/job\n", **files, **{"sys__fs__cgroup__memory__job__memory.stat": "total_inactive_file 0\n"}
    )


def _v2_quota(folder: Path) -> tuple[str, ...]:
    return machine(folder, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__cpu.max": "50000 100000\n"})


def _swap(folder: Path) -> tuple[str, ...]:
    text = f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {12 * GIB // 1024} kB\nSwapTotal: 8388608 kB\nSwapFree: 4194304 kB\n"
    return machine(folder, proc__meminfo=text)


def _old_package(folder: Path) -> None:
    write(folder / "old/rich-9.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: rich\nVersion: 9.1\n")


def broken_package(folder: Path) -> None:
    write(folder / "old/uvicorn.py", "raise ImportError('libuv.so.1: cannot open shared object file')\n")


def crashing_package(folder: Path) -> None:
    write(folder / "old/uvicorn.py", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")


def _gpu_without_driver(folder: Path) -> tuple[str, ...]:
    pci = "sys__bus__pci__devices__0000:17:00.0__"
    return machine(folder, **{f"{pci}vendor": "0x10de\n", f"{pci}class": "0x030200\n"})


def _driver(folder: Path) -> tuple[str, ...]:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Tue Aug 27\n"
    return (*_gpu_without_driver(folder), *machine(folder, proc__driver__nvidia__version=text))


def _silent_driver(folder: Path) -> None:
    program = write(folder / "bin/nvidia-smi", "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)


def _listing_driver(said: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        write(folder / "bin/nvidia-smi", f"#!/bin/sh\necho '{said}'\n").chmod(0o755)

    return plant


def _file_for_output(folder: Path) -> None:
    write(folder / "output", "not a folder")


def _truncated(folder: Path) -> tuple[str, ...]:
    save_tiny(folder / "data/models/base/tiny")
    weights = folder / "data/models/base/tiny/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return ("--model", "tiny")


def _pointer(folder: Path) -> tuple[str, ...]:
    write(folder / "data/models/base/tiny/config.json", "{}")
    write(
        folder / "data/models/base/tiny/model.safetensors", f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    )
    return ("--model", "tiny")


PATH_OF_OLD = "export PYTHONPATH=$PWD/old:$PYTHONPATH"
WITHOUT_COMPILER = f"mkdir bin && ln -s {shutil.which('env')} bin && export PATH=$PWD/bin"
FAULTS = [
    Fault("machine", "memory-limit", "WARN", "may use 3.0 GiB of the machine's 16.0 GiB", plant=_v2_memory),
    Fault("machine", "memory", "FAIL", "512.0 MiB free of 16.0 GiB", plant=_v1_memory),
    Fault("machine", "processors", "WARN", "0.5 of a CPU", plant=_v2_quota),
    Fault("machine", "swap", "WARN", "4.0 GiB of 8.0 GiB swap", plant=_swap),
    Fault("machine", "open-files", "FAIL", "100 files", "ulimit -n 4096", before="ulimit -S -n 100"),
    Fault("machine", "file-size", "FAIL", "97.7 MiB", "ulimit -f unlimited", before="ulimit -S -f 100000"),
    Fault("machine", "address-space", "WARN", "4.0 GiB", "ulimit -v unlimited", before="ulimit -S -v 4194304"),
    Fault(
        "machine",
        "locale",
        "WARN",
        "ascii",
        "export PYTHONUTF8=1",
        variables=(("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")),
    ),
    Fault("machine", "clock", "WARN", "is dated 2096-10-02", "touch data/training/raw/rows.jsonl", plant=_future),
    Fault("folders", "home", "WARN", "/proc/nobody", "mkdir -p /tmp/home && export HOME=/tmp/home", before="export HOME=/proc/nobody"),
    Fault(
        "folders",
        "cache-folder",
        "WARN",
        "/proc/cache/llamahome",
        "export XDG_CACHE_HOME=",
        variables=(("XDG_CACHE_HOME", "/proc/cache"),),
    ),
    Fault("folders", "temporary-folder", "FAIL", "/proc/tmp", "export TMPDIR=", variables=(("TMPDIR", "/proc/tmp"),)),
    Fault("folders", "output-folder", "FAIL", "is a file", "export LLAMAHOME_OUTPUT__DIR=", plant=_file_for_output),
    Fault(
        "settings",
        "launcher",
        "FAIL",
        "a run waits for 4 processes at 10.0.0.9:29400",
        "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT",
        variables=(("RANK", "0"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "10.0.0.9"), ("MASTER_PORT", "29400")),
    ),
    Fault("settings", "variables", "WARN", "LLAMAHOME_SPEED", "unset LLAMAHOME_SPEED", variables=(("LLAMAHOME_SPEED", "9"),)),
    Fault(
        "settings",
        "variables",
        "FAIL",
        "LLAMAHOME_TRAINING__EPOCH",
        'export LLAMAHOME_TRAINING__EPOCHS="$LLAMAHOME_TRAINING__EPOCH" && unset LLAMAHOME_TRAINING__EPOCH',
        variables=(("LLAMAHOME_TRAINING__EPOCH", "9"),),
    ),
    Fault(
        "settings",
        "settings-files",
        "FAIL",
        "training_config.yaml:2:3",
        "epochs",
        plant=_settings("training:\n  epocs: 3\n"),
        mends=False,
    ),
    Fault("python", "packages", "FAIL", "rich is 9.1, not >=14", "'rich>=14'", before=PATH_OF_OLD, plant=_old_package, mends=False),
    Fault("python", "package-versions", "WARN", "rich 9.1 and", "unset PYTHONPATH", before=PATH_OF_OLD, plant=_old_package, mends=False),
    Fault("gpu-driver", "gpu-driver", "FAIL", "1 NVIDIA GPU, but no driver", "nvidia-driver-580", plant=_gpu_without_driver, mends=False),
    Fault("gpu-driver", "gpu-driver", "FAIL", "is built without CUDA: only the processor", "/cu130", plant=_driver, mends=False),
    Fault(
        "gpu-driver",
        "gpu-driver",
        "FAIL",
        "Driver/library version mismatch",
        "sudo reboot",
        before="export PATH=$PWD/bin:$PATH",
        plant=_silent_driver,
        mends=False,
    ),
    *(
        Fault(
            "gpu-driver",
            "gpu-driver",
            "FAIL",
            "1 NVIDIA GPU with driver 535.104.05, but torch",
            "/cu126",
            before="export PATH=$PWD/bin:$PATH",
            plant=_listing_driver(said),
            mends=False,
        )
        for said in (
            "NVIDIA H100, 535.104.05, 9.0, 81559, 80000",
            "| NVIDIA-SMI 535   Driver Version: 535.104.05   CUDA Version: 12.2 |",
        )
    ),
    Fault("base-model", "base-model", "FAIL", "it is cut short", plant=_truncated),
    Fault("base-model", "base-model", "FAIL", "Git LFS pointer", plant=_pointer),
    Fault("base-model", "base-model", "WARN", "not on this machine yet", "llamahome models fetch smollm2-135m-instruct", mends=False),
    Fault(
        "base-model",
        "base-model",
        "FAIL",
        "no model 'tinny'",
        "llamahome doctor --model smollm2-135m-instruct",
        plant=lambda _: ("--model", "tinny"),
        mends=False,
    ),
    Fault(
        "processor-level",
        "processor-level",
        "WARN",
        "ATEN_CPU_CAPABILITY",
        "unset ATEN_CPU_CAPABILITY",
        variables=(("ATEN_CPU_CAPABILITY", "default"),),
    ),
    Fault(
        "processor-level",
        "back-end",
        "FAIL",
        "without CUDA",
        "export LLAMAHOME_MODEL__BACKEND=auto",
        variables=(("LLAMAHOME_MODEL__BACKEND", "cuda"),),
    ),
    Fault("compiled-passes", "compiler", "WARN", "no C++ compiler", None, before=WITHOUT_COMPILER),
    Fault(
        "compiled-passes", "compiler", "WARN", "no C++ compiler", "unset CXX", before=f"{WITHOUT_COMPILER}; export CXX=/none", mends=False
    ),
    Fault(
        "compiled-passes",
        "compiled-passes",
        "WARN",
        "plain PyTorch is used",
        "unset LLAMAHOME_CPU_LEVEL",
        variables=(("LLAMAHOME_CPU_LEVEL", "sse9"),),
    ),
    Fault(
        "hub",
        "hub",
        "FAIL",
        "through http://127.0.0.1:9",
        "unset https_proxy",
        variables=(("https_proxy", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", "0")),
        plant=lambda _: ("--network",),
        mends=False,
    ),
    Fault(
        "hub",
        "hub",
        "WARN",
        "HF_HUB_OFFLINE",
        "unset HF_HUB_OFFLINE",
        variables=(("HF_HUB_OFFLINE", "1"),),
        plant=lambda _: ("--network",),
        mends=False,
    ),
]


IMPORTING_TORCH = ("gpu-driver", "base-model", "processor-level", "compiled-passes")
