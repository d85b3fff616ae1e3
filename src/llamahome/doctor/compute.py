"""Checks what this machine computes: matrix products of each device, the back end of a run, and the compiled passes.

Imports torch. Cost: 0.1 to 2 s for the products, 5 to 10 s where the passes have to be compiled first.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llamahome.config.schema import Config
from llamahome.distributed.devices import device_here
from llamahome.doctor.checks import Check, one_line, passed, warned
from llamahome.doctor.settings import of_problems
from llamahome.errors import LlamaHomeError
from llamahome.model.backends.choose import choose_backend
from llamahome.model.backends.cpu import native
from llamahome.monitoring.throughput import measured_peak_flops

_SLOW_FLOPS = 10e9
"""Operations a second in float32. measured: one core of a Zen 4 with AVX2 reaches 60 to 130; below 10 the starter takes minutes a step."""
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""What decides how fast products are, as Linux names it."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of a large matrix product on one device."""

    device: str
    float32: float
    bfloat16: float | None
    """None if the device has none."""


def measure_rates() -> list[Rates]:
    """Of the processor and of each GPU."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    elif torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return [Rates(str(device), measured_peak_flops(device, torch.float32), _bfloat16(device)) for device in devices]


def _bfloat16(device: torch.device) -> float | None:
    try:
        return measured_peak_flops(device, torch.bfloat16)
    except (RuntimeError, TypeError):
        return None


def rate_check(rates: Rates) -> Check:
    """Whether products are as fast as a training needs."""
    reduced = "no bfloat16" if rates.bfloat16 is None else f"{_gflops(rates.bfloat16)} in bfloat16"
    detail = f"{_gflops(rates.float32)} in float32, {reduced}"
    name = f"matrix-rate-{rates.device.replace(':', '-')}"
    best = max(rates.float32, rates.bfloat16 or 0.0)
    if best < _SLOW_FLOPS:
        text = f"{detail}: training is slow here; other programs may be running"
        return warned(name, text, "unset OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") == "1" else None)
    return passed(name, detail)


def _gflops(rate: float) -> str:
    return f"{rate / 1e12:,.2f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.0f} GFLOP/s"


def level_check() -> Check:
    """Which instruction sets the processor has, and which of them torch uses."""
    flags = set(native._processor_flags().split())
    names = ", ".join(name for name in _FLAGS if name in flags) or "none of the fast instruction sets"
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{names}; torch uses {capability}, with {torch.get_num_threads()} threads"
    limits = [name for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if name in os.environ]
    if limits:
        text = f"{detail}; {', '.join(limits)} keeps it from faster ones"
        return warned("processor-level", text, f"unset {' '.join(limits)}")
    if capability in ("DEFAULT", "NO AVX"):
        return warned("processor-level", f"{detail}: products are several times slower than with AVX2")
    return passed("processor-level", detail)


def backend_check(config: Config) -> Check:
    """Which back end and number type a run takes, and why."""
    try:
        device = device_here(processor=config.model.backend == "cpu")
        backend = choose_backend(config, device)
    except LlamaHomeError as error:
        check = of_problems("back-end", error.problems)
        wrong_backend = error.problems[0].where == "model.backend"
        return replace(check, help="export LLAMAHOME_MODEL__BACKEND=auto") if wrong_backend else check
    chosen = f"model.backend {config.model.backend}: " if config.model.backend != "auto" else ""
    precision = backend.precision
    name = str(precision.compute).removeprefix("torch.")
    return passed("back-end", f"{chosen}{type(backend).__name__} on {device}, {name} ({precision.reason})")


@dataclass(frozen=True)
class CompiledPasses:
    """What became of compiling and loading the passes for processors."""

    compiler: str | None
    cache: str
    levels: dict[str, str]
    """Level -> empty if its library loads, or why not; only levels that were tried."""
    requested: str
    unsupported: str | None
    """Why the requested level cannot be compiled for."""


def try_passes() -> CompiledPasses:
    """Compile the requested level if it is not in the cache, and load it and every other level that is."""
    compiler, requested = native._compiler(), native.requested_level()
    unsupported = native.unsupported_reason()
    levels: dict[str, str] = {}
    if compiler is not None and unsupported is None:
        for level in native.LEVELS:
            present = native.unsupported_reason(level) is None and _in_cache(compiler, level)
            if level == requested or present:
                kernels = native.load_kernels(level)
                levels[level] = kernels if isinstance(kernels, str) else ""
    return CompiledPasses(compiler, str(native.cache_folder()), levels, requested, unsupported)


def _in_cache(compiler: str, level: str) -> bool:
    try:
        return (native.cache_folder() / native._file_name(compiler, level)).is_file()
    except OSError:
        return False


def pass_checks(passes: CompiledPasses) -> Iterator[Check]:
    """Whether there is a compiler, and whether its libraries load."""
    if passes.unsupported is not None:
        yield warned("compiled-passes", f"{passes.unsupported}: plain PyTorch is used, which is slower", "unset LLAMAHOME_CPU_LEVEL")
        return
    if passes.compiler is None:
        text = "there is no C++ compiler (g++ or c++): plain PyTorch is used, which is slower"
        yield warned("compiler", text, _install_compiler())
        return
    yield passed("compiler", passes.compiler)
    wrong = {level: reason for level, reason in passes.levels.items() if reason}
    if wrong:
        level, reason = next(iter(wrong.items()))
        text = f"level {level}: {one_line(reason)}; plain PyTorch is used, which is slower"
        yield warned("compiled-passes", text, _mend(passes))
    else:
        yield passed("compiled-passes", f"{', '.join(passes.levels)} from {passes.cache}")


def _install_compiler() -> str | None:
    if os.environ.get("CXX") and shutil.which(os.environ["CXX"]) is None:
        return "unset CXX"
    commands = {
        "apt-get": "sudo apt-get install g++",
        "dnf": "sudo dnf install gcc-c++",
        "apk": "sudo apk add g++",
        "brew": "xcode-select --install",
    }
    return next((command for program, command in commands.items() if shutil.which(program)), None)


def _mend(passes: CompiledPasses) -> str | None:
    """A cache that cannot be written is replaced; a library that does not load is made again."""
    folder = Path(passes.cache)
    existing = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        return "export XDG_CACHE_HOME=/tmp/cache"
    return f"rm -r {folder}" if folder.is_dir() else None
